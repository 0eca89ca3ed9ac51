"""Every Triton kernel against the float64 reference: outputs and all gradients, token by token.

Run by `test_triton_interpreted.py`, in a process of its own: under the interpreter on a CPU, for
real where a GPU is. New memory is filled with NaN, so that an unwritten value fails.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from manifold_hc import reference
from manifold_hc.constraints import sinkhorn as sinkhorn_reference
from manifold_hc.kernels.triton import (
    boundary,
    coefficients,
    coefficients_backward,
    norm,
    plan,
    project,
    read,
    rebuild,
    sinkhorn,
    write,
)
from manifold_hc.kernels.values import (
    InputNorm,
    MapParameters,
    ReadingGradients,
    SavedBoundary,
    SavedMaps,
    Settings,
    WriteInputs,
)
from manifold_hc.numerics import PRESETS

DEVICE = "cpu" if plan.interpreted() else "cuda"
STREAMS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# One rounding of the result; the interpreter truncates bfloat16, which is a whole ulp.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1 / 128, torch.float16: 1 / 1024}
# Half-width streams are multiplied by phi in tf32, which the interpreter does not imitate.
PROJECTED = {dtype: 2e-5 if DEVICE == "cpu" else 2e-3 for dtype in STREAMS.values()}
PROJECTED[torch.float32] = 2e-5
NAMES = ("paper", "deepseek_v4")
# Under the interpreter numpy warns of the NaN that a test puts in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """New memory is NaN."""
    plain = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def filled(make):
        def call(*arguments, **options):
            made = make(*arguments, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    monkeypatch.setattr(torch, "empty", filled(plain[0]))
    monkeypatch.setattr(torch, "empty_like", filled(plain[1]))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(plain[2]))


def draw(*shape, dtype=torch.float32, std=1.0):
    return (torch.randn(*shape) * std).to(dtype).to(DEVICE)


def wide(tensor):
    """A float64 leaf of the same numbers."""
    return tensor.detach().cpu().double().requires_grad_()


def close(name, got, wanted, tolerance):
    """Relative error of each token (row of the first dimension), worst first."""
    got, wanted = got.detach().cpu().double(), wanted.detach().double()
    assert got.shape == wanted.shape, name
    if not got.numel():
        return
    got, wanted = got.reshape(len(got), -1), wanted.reshape(len(wanted), -1)
    scale = wanted.norm(dim=1).clamp_min(1e-2 * wanted.norm() / len(wanted) ** 0.5 + 1e-6)
    error = ((got - wanted).norm(dim=1) / scale).max()
    assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.1e}"  # a NaN fails it too


LOGITS = {"0.1": 0.1, "1": 1.0, "4": 4.0, "16": 16.0, "equal": 0.0, "row": 1.0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16])
def test_sinkhorn(n, name):
    preset = PRESETS[name]
    groups = [draw(5, n, n, std=std) for std in LOGITS.values()]
    groups[-1][:, 0] -= 120
    logits, grad = torch.cat(groups), draw(5 * len(LOGITS), n, n)
    numbers = (20, preset.res_is_transposed, preset.hc_eps)
    leaf = wide(logits)
    wanted = sinkhorn_reference(leaf, 20, preset)
    (dlogits,) = torch.autograd.grad(wanted, leaf, grad.cpu().double())
    # A logit of 100 has half an ulp of 4e-6, which res and its gradient inherit.
    hard = torch.tensor([key in ("16", "row") for key in LOGITS]).repeat_interleave(5)
    tolerance = torch.where(hard, 2e-5, 2e-6)
    got, found = (
        sinkhorn.sinkhorn(logits, *numbers),
        sinkhorn.sinkhorn_backward(grad, logits, *numbers),
    )
    for key, a, b in (("res", got, wanted), ("dlogits", found, dlogits)):
        error = (a.cpu().double() - b.detach()).flatten(1).norm(dim=1)
        assert (error <= tolerance * n**0.5).all(), f"{key}: {error}"


@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("name", NAMES)
def test_sinkhorn_iterations(name, iterations):
    preset = PRESETS[name]
    logits, grad = draw(33, 3, 3, std=2.0), draw(33, 3, 3)
    numbers = (iterations, preset.res_is_transposed, preset.hc_eps)
    leaf = wide(logits)
    wanted = sinkhorn_reference(leaf, iterations, preset)
    (dlogits,) = torch.autograd.grad(wanted, leaf, grad.cpu().double())
    close("res", sinkhorn.sinkhorn(logits, *numbers), wanted, 2e-6)
    found = sinkhorn.sinkhorn_backward(grad, logits, *numbers)
    error = (found.cpu().double() - dlogits).flatten(1).norm(dim=1)
    assert error.max() < 5e-6


def test_sinkhorn_without_epsilon_stays_finite_and_passes_nan_on():
    logits = draw(4, 4, 4, std=16.0)
    logits[0, :, 0] -= 120
    assert sinkhorn.sinkhorn(logits, 20, True, 0.0).isfinite().all()
    assert sinkhorn.sinkhorn_backward(draw(4, 4, 4), logits, 20, True, 0.0).isfinite().all()
    logits[1, 0, 0] = torch.nan
    found = sinkhorn.sinkhorn(logits, 20, False, 0.0).isnan().flatten(1).any(1)
    assert found.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("tokens", "K", "rows", "key"),
    [(33, 7, 3, "fp32"), (5, 96, 24, "bf16"), (17, 300, 130, "fp32"), (3, 64, 5, "fp16"),
     (0, 64, 5, "fp32")],
)  # fmt: skip
def test_project(tokens, K, rows, key, monkeypatch):
    monkeypatch.setattr(plan, "SPLIT_CHANNELS", 64)  # several splits
    dtype = STREAMS[key]
    v, phi, grad = draw(tokens, K, dtype=dtype), draw(rows, K, std=K**-0.5), draw(tokens, rows)
    a, b = wide(v), wide(phi)
    wanted = reference.project(a.unsqueeze(1), b, 1e-6)
    wants = torch.autograd.grad(wanted, (a, b), grad.cpu().double())
    projected, inverse_rms = project.project(v, phi, 1e-6)
    close("projected", projected, wanted, PROJECTED[dtype])
    close("1 / rms", inverse_rms, (a.square().mean(1) + 1e-6).rsqrt(), 1e-6)
    dv, dphi = project.project_backward(grad, v, phi, projected, inverse_rms)
    assert dv.dtype == dtype
    close("dv", dv, wants[0], max(ROUNDING[dtype], PROJECTED[dtype]))
    close("dphi", dphi, wants[1], PROJECTED[dtype])


SHAPES = [
    (33, 4, 64, "bf16"), (5, 3, 7, "fp32"), (7, 1, 96, "fp16"), (3, 5, 64, "bf16"),
    (9, 2, 300, "fp32"), (2, 8, 64, "bf16"), (2, 16, 7, "fp32"), (0, 4, 64, "bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "n", "C", "key"), SHAPES)
def test_read(tokens, n, C, key):
    dtype = STREAMS[key]
    x, pre, grad = draw(tokens, n, C, dtype=dtype), draw(tokens, n), draw(tokens, C, dtype=dtype)
    a, b = wide(x), wide(pre)
    wanted = reference.read(a, b)
    wants = torch.autograd.grad(wanted, (a, b), grad.cpu().double())
    u = read.read(x, pre)
    assert u.dtype == dtype
    close("u", u, wanted, ROUNDING[dtype])
    dx, dpre = read.read_backward(grad, x, pre)
    assert dx.dtype == dtype
    close("dx", dx, wants[0], ROUNDING[dtype])
    close("dpre", dpre, wants[1], 2e-5)


@pytest.mark.parametrize("widens", [True, False])
@pytest.mark.parametrize(("tokens", "n", "C", "key"), SHAPES)
def test_write(tokens, n, C, key, widens):
    dtype = STREAMS[key]
    branch = torch.float32 if widens else dtype
    x, y = draw(tokens, n, C, dtype=dtype), draw(tokens, C, dtype=branch)
    post, res = draw(tokens, n), draw(tokens, n, n)
    grad = draw(tokens, n, C, dtype=dtype)
    leaves = [wide(t) for t in (x, y, post, res)]
    wanted = reference.write(*leaves)
    wants = torch.autograd.grad(wanted, leaves, grad.cpu().double())
    out = write.write(x, y, post, res)
    assert out.dtype == dtype
    close("x'", out, wanted, ROUNDING[dtype])
    found = write.write_backward(grad, x, y, post, res)
    for name, got, want in zip(("dx", "dy", "dpost", "dres"), found, wants, strict=True):
        close(name, got, want, ROUNDING[got.dtype])
    assert [t.dtype for t in found[:2]] == [dtype, branch]
    for name, got, want in zip(
        ("dy", "dpost"), write.branch_backward(grad, y, post), wants[1:3], strict=True
    ):
        close(name, got, want, ROUNDING[got.dtype])


@pytest.mark.parametrize(
    ("tokens", "n", "C", "key", "writes"),
    [(33, 4, 64, "bf16", 5), (5, 3, 7, "fp32", 2), (7, 1, 96, "fp16", 1), (3, 5, 33, "bf16", 3),
     (4, 2, 300, "fp32", 19), (2, 8, 64, "bf16", 2), (2, 16, 7, "fp32", 2), (3, 4, 20, "fp32", 0),
     (0, 4, 64, "bf16", 2)],
)  # fmt: skip
@pytest.mark.parametrize("widens", [True, False])
def test_rebuild(tokens, n, C, key, writes, widens):
    """The bits of separate writes and reads."""
    dtype = STREAMS[key]
    branch = torch.float32 if widens else dtype
    streams = [draw(tokens, n, C, dtype=dtype)]
    steps = [
        (draw(tokens, C, dtype=branch), draw(tokens, n), draw(tokens, n, n)) for _ in range(writes)
    ]
    reads = [draw(tokens, n) for _ in range(writes + 1)]
    for step in steps:
        streams.append(write.write(streams[-1], *step))
    norms = [InputNorm(draw(C), 0.1) if k % 2 else None for k in range(writes + 1)]
    got, inputs = rebuild.rebuild(streams[0], steps, reads, norms)
    assert len(got) == writes
    assert len(inputs) == writes + 1
    for a, b in zip(got, streams[1:], strict=True):
        assert torch.equal(a, b)
        assert a.dtype == dtype
    for a, x, pre, own in zip(inputs, streams, reads, norms, strict=True):
        u = read.read(x, pre)
        assert torch.equal(a, u if own is None else norm.normalised(u, own))


def connection(tokens, n, C, dtype, constraint, std):
    rows = 2 * n + (0 if constraint == "identity" else n * n)
    return (
        draw(tokens, n, C, dtype=dtype),
        draw(rows, n * C, std=(n * C) ** -0.5),
        torch.tensor([0.7, -0.4, std], device=DEVICE),
        draw(rows, std=0.5),
    )


def settings_of(name, constraint="sinkhorn", iterations=20, learns=True):
    preset = PRESETS[name]
    numbers = (preset.res_is_transposed, preset.norm_eps, preset.hc_eps)
    return Settings(constraint, iterations, *numbers, learns)


RESULTS = {"written": "oC", "u": "C", "pre": "o", "post": "o", "res": "oo", "link": "oC"}


def cotangents_of(tokens, n, C, dtype, missing, names):
    sizes = {"o": n, "C": C}
    return [
        None
        if key in missing
        else draw(
            tokens,
            *map(sizes.get, RESULTS[key]),
            dtype=dtype if "C" in RESULTS[key] else torch.float32,
        )
        for key in names
    ]


def derived(outputs, cotangents, leaves):
    """Gradients of the leaves in float64, zero where nothing reaches one."""
    terms = [
        (output * cotangent.cpu().double()).sum()
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None
    ]
    return torch.autograd.grad(sum(terms, sum(0 * leaf.sum() for leaf in leaves)), leaves)


def next_streams(res, x, settings):
    """Mixed streams of the next write, whose gradient comes through the link."""
    return (res if settings.learns else res.detach()) @ x


def judged(tensors, settings, name, cotangents):
    """The reference's outputs and gradients in float64."""
    leaves = [wide(t) for t in tensors]
    pre, post, res = reference.coefficients(
        *leaves, settings.iterations, settings.constraint, PRESETS[name]
    )
    u = reference.read(leaves[0], pre)
    outputs = (u, pre, post, res, next_streams(res, leaves[0], settings))
    return outputs[:4], derived(outputs, cotangents, leaves)


def saved(made):
    return SavedMaps(made.res, made.projected, made.inverse_rms)


def check_connection(
    tokens, n, C, dtype, constraint, name, std=1.0, missing=(), iterations=20, learns=True
):
    tensors = connection(tokens, n, C, dtype, constraint, std)
    settings = settings_of(name, constraint, iterations, learns)
    cotangents = cotangents_of(tokens, n, C, dtype, missing, list(RESULTS)[1:])
    wanted, wants = judged(tensors, settings, name, cotangents)
    x, *parameters = tensors
    u, made = coefficients.coefficients_and_read(x, MapParameters(*parameters), settings)
    loose = PROJECTED[dtype] * max(1.0, std)
    assert u.dtype == dtype
    close("u", u, wanted[0], max(ROUNDING[dtype], loose))
    for key, want in zip(("pre", "post", "res"), wanted[1:], strict=True):
        close(key, getattr(made, key), want, loose)
    found = coefficients_backward.coefficients_and_read_backward(
        ReadingGradients(*cotangents), x, MapParameters(*parameters), saved(made), settings
    )
    assert found[0].dtype == dtype
    close("dx", found[0], wants[0], max(ROUNDING[dtype], 2 * loose))
    close("dphi", found[1], wants[1], 4 * loose)
    close("dbias", found[3][None], wants[3][None], 4 * loose)
    close("dalpha", found[2][None], wants[2][None], 4 * loose)


def rounded(tensor, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # see ROUNDING
        return (tensor.float().view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    return tensor.to(dtype).double()


def normalised(u, weight, eps, dtype):
    """u, rounded as it is on its way, in units of its root mean square."""
    u = u + (rounded(u.detach(), dtype) - u.detach())
    return u * (u.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def check_boundary(
    tokens, n, C, dtype, constraint, name, given, normed,
    std=1.0, missing=(), iterations=20, learns=True, branch=None,
):  # fmt: skip
    """`given`: read with weights known before; `normed`: u is normalised."""
    x, phi, alpha, bias = connection(tokens, n, C, dtype, constraint, std)
    y, post, res = draw(tokens, C, dtype=branch or dtype), draw(tokens, n), draw(tokens, n, n)
    pre = draw(tokens, n) if given else None
    input_norm = InputNorm(1 + draw(C, std=0.5), 0.01) if normed else None
    settings = settings_of(name, constraint, iterations, learns)
    parameters = MapParameters(phi, alpha, bias)
    branch_write = WriteInputs(x, y, post, res)
    written, u, made = boundary.boundary(branch_write, pre, parameters, input_norm, settings)
    assert (written.dtype, u.dtype) == (dtype, dtype)
    assert torch.equal(written, write.write(x, y, post, res))
    if not normed:
        assert torch.equal(u, read.read(written, made.pre if pre is None else pre))

    inputs = {"written": written, "pre": pre, "phi": phi, "alpha": alpha, "bias": bias}
    inputs["weight"] = input_norm.weight if normed else None
    leaves = {key: wide(t) for key, t in inputs.items() if t is not None}
    maps = [leaves[key] for key in ("written", "phi", "alpha", "bias")]
    wanted = reference.coefficients(*maps, iterations, constraint, PRESETS[name])
    reads = reference.read(leaves["written"], leaves.get("pre", wanted[0]))
    if normed:
        reads = normalised(reads, leaves["weight"], input_norm.eps, dtype)
    loose = PROJECTED[dtype] * max(1.0, std)
    once = max(ROUNDING[dtype], loose)
    close("u", u, reads, (2 if normed else 1) * once)
    for key, want in zip(("pre", "post", "res"), wanted, strict=True):
        close(key, getattr(made, key), want, loose)

    cotangents = cotangents_of(tokens, n, C, dtype, missing, RESULTS)
    link = next_streams(wanted[2], leaves["written"], settings)
    outputs = (leaves["written"], reads, *wanted, link)
    wants = derived(outputs, cotangents, list(leaves.values()))
    grad_written, *grads = cotangents
    found = coefficients_backward.boundary_backward(
        grad_written, ReadingGradients(*grads), SavedBoundary(written, y, post, pre),
        parameters, input_norm, saved(made), settings,
    )._asdict()  # fmt: skip
    whole, dy, dpost = found["written"], found.pop("y"), found.pop("post")
    tolerances = dict.fromkeys(("phi", "alpha", "bias", "pre"), 4 * loose)
    if normed:  # u, read again, may round otherwise
        tolerances = {key: max(4 * loose, ROUNDING[dtype]) for key in tolerances}
    for key, want in zip(leaves, wants, strict=True):
        got = found.pop(key)
        assert got.dtype == inputs[key].dtype
        whole_tensor = key in ("alpha", "bias", "weight")
        got, want = (got[None], want[None]) if whole_tensor else (got, want)
        close(f"d{key}", got, want, tolerances.get(key, 2 * once))
    assert all(left.numel() == 0 for left in found.values())
    assert (whole.dtype, dy.dtype) == (dtype, y.dtype)
    for key, got, want in zip(
        ("dy", "dpost"),
        (dy, dpost),
        ((wide(post)[..., None] * wide(whole)).sum(1), (wide(whole) * wide(y)[:, None]).sum(2)),
        strict=True,
    ):
        close(key, got, want, ROUNDING[got.dtype])


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("constraint", ["sinkhorn", "identity", "none"])
@pytest.mark.parametrize(
    ("tokens", "n", "C", "key", "name"),
    [(70, 4, 64, "bf16", "deepseek_v4"), (5, 3, 7, "fp32", "paper"), (3, 1, 96, "fp16", "paper")],
)
def test_boundary(tokens, n, C, key, constraint, name, normed, given, monkeypatch):
    monkeypatch.setattr(plan, "SPLIT_CHANNELS", 64)
    branch = torch.float32 if normed else None
    check_boundary(tokens, n, C, STREAMS[key], constraint, name, given, normed, branch=branch)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("tokens", "n", "C", "key"),
    [(9, 2, 96, "fp32"), (3, 5, 64, "fp16"), (5, 8, 64, "fp32"), (1, 6, 7, "bf16"),
     (3, 7, 33, "fp32"), (2, 16, 20, "fp32")],
)  # fmt: skip
def test_boundary_stream_counts(tokens, n, C, key, given):
    name = NAMES[given]
    check_boundary(
        tokens, n, C, STREAMS[key], "sinkhorn", name, given, True, std=2.0, iterations=5,
        branch=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize(
    "missing",
    [("written",), ("u",), ("pre", "post"), ("res",), ("link",), ("res", "link"),
     ("written", "pre", "post", "res", "link"), ("written", "u", "pre", "post", "res"),
     tuple(RESULTS)],
)  # fmt: skip
@pytest.mark.parametrize("given", [True, False])
def test_boundary_missing_gradients(missing, given):
    check_boundary(
        5, 3, 20, torch.float32, "sinkhorn", "deepseek_v4", given, given != ("u" in missing),
        missing=missing, iterations=5,
    )  # fmt: skip


@pytest.mark.parametrize("missing", [(), ("res",), ("u",)])
def test_the_link_teaches_res_only_where_it_should(missing):
    for constraint in ("sinkhorn", "none"):
        numbers = {"iterations": 5, "missing": missing, "learns": False}
        check_connection(5, 4, 20, torch.float32, constraint, "paper", **numbers)
        check_boundary(5, 4, 20, torch.float32, constraint, "paper", True, False, **numbers)


@pytest.mark.parametrize("given", [True, False])
def test_boundary_without_tokens(given):
    check_boundary(0, 4, 20, torch.bfloat16, "sinkhorn", "paper", given, True)


def test_boundary_over_several_blocks_of_tokens(monkeypatch):
    monkeypatch.setattr(plan, "PROGRAMS", 3)
    check_boundary(110, 4, 64, torch.bfloat16, "sinkhorn", "paper", True, True, iterations=5)
    check_boundary(40, 2, 600, torch.float32, "none", "paper", False, True)


def test_the_boundary_has_the_same_bits_alone_and_in_a_batch(monkeypatch):
    monkeypatch.setattr(plan, "SPLIT_CHANNELS", 64)
    x, phi, alpha, bias = connection(70, 4, 64, torch.bfloat16, "sinkhorn", 1.0)
    own = WriteInputs(x, draw(70, 64, dtype=torch.bfloat16), draw(70, 4), draw(70, 4, 4))
    pre, input_norm = draw(70, 4), InputNorm(draw(64), 1e-6)
    rest = (MapParameters(phi, alpha, bias), input_norm, settings_of("paper", iterations=3))
    whole = boundary.boundary(own, pre, *rest)
    one = WriteInputs(*(t[67:68].clone() for t in own))
    alone = boundary.boundary(one, pre[67:68].clone(), *rest)
    for a, b in zip(tree_leaves(whole), tree_leaves(alone), strict=True):
        assert torch.equal(a[67:68], b)


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("constraint", ["sinkhorn", "identity", "none"])
@pytest.mark.parametrize(
    ("tokens", "n", "C", "key"),
    [(33, 4, 64, "bf16"), (5, 3, 7, "fp32"), (3, 1, 96, "fp16")],
)
def test_connection(tokens, n, C, key, constraint, name, one_launch, monkeypatch):
    if not one_launch:
        monkeypatch.setattr(plan, "ONE_LAUNCH_BYTES", 0)
        monkeypatch.setattr(plan, "SPLIT_CHANNELS", 64)
    check_connection(tokens, n, C, STREAMS[key], constraint, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "n", "C", "key"),
    [(9, 2, 96, "fp32"), (3, 5, 64, "fp16"), (5, 8, 64, "fp32"), (1, 6, 7, "bf16"),
     (3, 7, 33, "fp32"), (2, 16, 20, "fp32")],
)  # fmt: skip
def test_stream_counts(tokens, n, C, key, name):
    check_connection(tokens, n, C, STREAMS[key], "sinkhorn", name, std=2.0, iterations=5)


@pytest.mark.parametrize("std", [0.1, 1.0, 4.0, 16.0])
def test_spread_logits(std):
    check_connection(17, 4, 20, torch.float32, "sinkhorn", "paper", std=std)


@pytest.mark.parametrize(
    "missing",
    [("u",), ("pre",), ("post",), ("res",), ("link",), ("pre", "post", "res", "link"),
     ("u", "pre", "post", "link"), ("u", "pre", "post", "res")],
)  # fmt: skip
@pytest.mark.parametrize("constraint", ["sinkhorn", "identity"])
def test_missing_gradients(missing, constraint):
    check_connection(5, 4, 20, torch.float32, constraint, "deepseek_v4", missing=missing)


@pytest.mark.parametrize("constraint", ["sinkhorn", "identity", "none"])
def test_no_tokens(constraint):
    check_connection(0, 4, 20, torch.bfloat16, constraint, "paper")


def test_token_splits_and_segments(monkeypatch):
    """Several programs share the tokens of phi's gradient and the channels of a token."""
    monkeypatch.setattr(plan, "ONE_LAUNCH_BYTES", 0)
    check_connection(70, 2, 600, torch.float32, "sinkhorn", "paper")


@pytest.mark.parametrize(("tokens", "n", "C", "key"), [(90, 2, 40, "fp32"), (110, 4, 64, "bf16")])
def test_a_program_goes_over_several_blocks_of_tokens(tokens, n, C, key, monkeypatch):
    """As with more tokens than there are programs for."""
    monkeypatch.setattr(plan, "PROGRAMS", 3)
    check_connection(tokens, n, C, STREAMS[key], "sinkhorn", "paper")


def test_same_bits_whatever_the_other_tokens():
    """Alone too; but the interpreter's products are NumPy's, whose bits depend on a row's place."""
    x, phi, alpha, bias = connection(33, 4, 64, torch.bfloat16, "sinkhorn", 1.0)
    settings = settings_of("paper")
    maps = MapParameters(phi, alpha, bias)
    whole = coefficients.coefficients_and_read(x, maps, settings)
    rows = [7] if plan.interpreted() else [0, 7]
    for row in rows:
        others = draw(row, 4, 64, dtype=torch.bfloat16)
        batch = torch.cat([others, x[7:8]])
        few = coefficients.coefficients_and_read(batch, maps, settings)
        for a, b in zip(tree_leaves(whole), tree_leaves(few), strict=True):
            assert torch.equal(a[7], b[row])

import pytest
import torch
from torch.autograd import gradcheck

from manifold_hc import functional
from manifold_hc.constraints import CONSTRAINTS
from manifold_hc.errors import BackendError, ConfigError, DtypeError, ShapeError
from tests import oracle

DOUBLE = torch.float64
EPS = {"paper": (1e-20, 0.0), "deepseek_v4": (1e-6, 1e-6)}


def parameters(n, C, k=None, dtype=DOUBLE, std=0.3):
    rows = 2 * n + (n * n if k is None else k)
    phi = std * torch.randn(rows, n * C, dtype=dtype)
    alpha = torch.tensor([0.7, 1.3, 0.9], dtype=dtype)
    return phi, alpha, 0.5 * torch.randn(rows, dtype=dtype)


def sublayer(x, phi, alpha, bias, y, **options):
    """Read and write with the coefficients of x, as a Connection does."""
    pre, post, res = functional.coefficients(x, phi, alpha, bias, **options)
    return functional.read(x, pre), functional.write(x, y, post, res)


@pytest.mark.parametrize("numerics", EPS)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_mhc_equals_the_oracle_in_outputs_and_gradients(n, numerics):
    check_against_oracle(n, numerics)


def check_against_oracle(n, numerics):
    torch.manual_seed(n)
    C, tokens, (norm_eps, hc_eps) = 7, 2, EPS[numerics]
    inputs = [torch.randn(tokens, n, C, dtype=DOUBLE), *parameters(n, C)]
    inputs.append(torch.randn(tokens, C, dtype=DOUBLE))
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.clone().requires_grad_() for tensor in inputs]
    u, new = sublayer(*ours, numerics=numerics, iterations=20)
    x, phi, alpha, bias, y = theirs
    settings = {
        "numerics": numerics,
        "iterations": 20,
        "norm_eps": norm_eps,
        "hc_eps": hc_eps,
    }
    pairs = [oracle.mhc_sublayer(x[t], phi, alpha, bias, y[t], **settings) for t in range(tokens)]
    wanted_u, wanted = (torch.stack(part) for part in zip(*pairs, strict=True))
    close(u, wanted_u)
    close(new, wanted)
    compare_gradients((u, new), ours, (wanted_u, wanted), theirs)


def compare_gradients(ours, our_inputs, theirs, their_inputs):
    weights = [torch.randn_like(output) for output in ours]
    for outputs in (ours, theirs):
        sum((w * out).sum() for w, out in zip(weights, outputs, strict=True)).backward()
    for mine, other in zip(our_inputs, their_inputs, strict=True):
        close(mine.grad, other.grad)


def close(ours, wanted):
    scale = wanted.abs().max()
    assert (ours - wanted).abs().max() <= 1e-12 * scale


@pytest.mark.parametrize("n", [1, 3])
def test_the_learned_exit_equals_the_oracle_in_outputs_and_gradients(n):
    C, tokens = 5, 2
    inputs = [
        torch.randn(tokens, n, C, dtype=DOUBLE),
        torch.randn(n, n * C, dtype=DOUBLE),
        torch.tensor([0.7], dtype=DOUBLE),
        torch.randn(n, dtype=DOUBLE),
    ]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.clone().requires_grad_() for tensor in inputs]
    got = functional.collapse(ours[0], functional.exit_coefficients(*ours))
    x, *rest = theirs
    heads = [oracle.v4_head(token, *rest, norm_eps=1e-6, hc_eps=1e-6) for token in x]
    wanted = torch.stack(heads)
    close(got, wanted)
    compare_gradients((got,), ours, (wanted,), theirs)


def test_hc_equals_the_oracle_in_outputs_and_gradients():
    n, C, tokens = 3, 5, 2
    letters = {
        "A_m": torch.randn(n),
        "A_r": torch.randn(n, n),
        "B": torch.randn(n),
        "W_m": torch.randn(C),
        "W_r": torch.randn(C, n),
        "W_b": torch.randn(C),
        "s_a": torch.tensor(0.6),
        "s_b": torch.tensor(0.8),
    }
    letters = {name: tensor.double().requires_grad_() for name, tensor in letters.items()}
    x = torch.randn(tokens, n, C, dtype=DOUBLE, requires_grad=True)
    y = torch.randn(tokens, C, dtype=DOUBLE, requires_grad=True)

    def ours():
        a = letters
        phi = torch.cat([a["W_m"][None], a["W_b"][None], a["W_r"].T])
        alpha = torch.stack([a["s_a"], a["s_b"], a["s_a"]])
        bias = torch.cat([a["A_m"], a["B"], a["A_r"].T.flatten()])
        pre, post, res = functional.hc_coefficients(x, phi, alpha, bias)
        return functional.read(x, pre), functional.write(x, y, post, res)

    def theirs():
        pairs = [oracle.hc_sublayer(x[t], y=y[t], norm_eps=1e-20, **letters) for t in range(tokens)]
        return [torch.stack(part) for part in zip(*pairs, strict=True)]

    leaves = [x, y, *letters.values()]
    weights = [torch.randn(tokens, C), torch.randn(tokens, n, C)]
    gradients = []
    for outputs in (ours(), theirs()):
        loss = sum((w * out).sum() for w, out in zip(weights, outputs, strict=True))
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(ours(), theirs(), strict=True):
        close(a, b)
    for a, b in zip(*gradients, strict=True):
        close(a, b)


def test_one_asymmetric_sublayer_by_hand():
    """n = 2, C = 1: every number differs, so no transposition or swap goes unseen."""
    x = torch.tensor([[2.0], [10.0]])
    pre, post = torch.tensor([0.5, 0.25]), torch.tensor([3.0, 7.0])
    res = torch.tensor([[1.0, 4.0], [5.0, 6.0]])
    assert functional.read(x, pre).tolist() == [3.5]
    new = functional.write(x, torch.tensor([100.0]), post, res)
    assert new.tolist() == [[2 + 40 + 300], [10 + 60 + 700]]
    assert functional.collapse(x).tolist() == [6.0]
    assert functional.collapse(x, torch.tensor([1.0, 3.0])).tolist() == [32.0]
    assert functional.expand(x[0], 3).tolist() == [[2.0], [2.0], [2.0]]


def test_packed_rows_are_pre_post_res_row_major():
    """Static maps of n = 2: the logits are the bias itself."""
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 3.0, 5.0])
    x = torch.randn(3, 2, 4)
    pre, post, res = functional.coefficients(x, None, None, bias, constraint="none")
    torch.testing.assert_close(pre, bias[:2].sigmoid().expand(3, 2))
    torch.testing.assert_close(post, 2 * bias[2:4].sigmoid().expand(3, 2))
    assert res[0].tolist() == [[1.0, 2.0], [3.0, 5.0]]
    *_, comb = functional.coefficients(
        x, None, None, bias, constraint="none", numerics="deepseek_v4"
    )
    assert comb[0].tolist() == [[1.0, 3.0], [2.0, 5.0]]


def test_each_gate_reaches_its_own_rows():
    n, C = 2, 3
    phi, _, bias = parameters(n, C)
    x = torch.randn(4, n, C, dtype=DOUBLE)
    base = functional.coefficients(x, phi, torch.zeros(3, dtype=DOUBLE), bias)
    for gate in range(3):
        alpha = torch.zeros(3, dtype=DOUBLE).index_fill(0, torch.tensor([gate]), 1.0)
        moved = functional.coefficients(x, phi, alpha, bias)
        changed = [not torch.equal(a, b) for a, b in zip(base, moved, strict=True)]
        assert changed == [index == gate for index in range(3)]


@pytest.mark.parametrize("numerics", EPS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_gradcheck_of_coefficients(constraint, numerics):
    n, C = 2, 3
    k = CONSTRAINTS[constraint].size(n)
    inputs = [torch.randn(2, n, C, dtype=DOUBLE), *parameters(n, C, k)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert gradcheck(
        lambda *a: functional.coefficients(
            *a, constraint=constraint, numerics=numerics, iterations=4
        ),
        inputs,
    )


def test_gradcheck_of_everything_else():
    n, C = 3, 2
    x = torch.randn(2, n, C, dtype=DOUBLE, requires_grad=True)
    y, h = (torch.randn(2, C, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    pre, post = (torch.randn(2, n, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    res = torch.randn(2, n, n, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(2 * n + n * n, dtype=DOUBLE, requires_grad=True)
    phi = torch.randn(2 + n, C, dtype=DOUBLE, requires_grad=True)
    alpha = torch.rand(3, dtype=DOUBLE, requires_grad=True)
    exit_phi = torch.randn(n, n * C, dtype=DOUBLE, requires_grad=True)
    one = torch.rand(1, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda h: functional.expand(h, n), [h])
    assert gradcheck(functional.read, [x, pre])
    assert gradcheck(functional.write, [x, y, post, res])
    assert gradcheck(functional.collapse, [x])
    assert gradcheck(functional.collapse, [x, pre])
    assert gradcheck(functional.hc_coefficients, [x, phi, alpha, bias])
    assert gradcheck(lambda x, b: functional.hc_coefficients(x, None, None, b), [x, bias])
    assert gradcheck(lambda x, b: functional.coefficients(x, None, None, b), [x, bias])
    assert gradcheck(functional.exit_coefficients, [x, exit_phi, one, bias[:n]])
    for numerics in EPS:
        assert gradcheck(lambda m, name=numerics: functional.sinkhorn(m, 20, name), [res])


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 1, 3)])
def test_any_leading_shape_and_stream_dtype(shape, dtype):
    n, C = 3, 7
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    h = torch.randn(*shape, C, dtype=dtype)
    x = functional.expand(h, n)
    pre, post, res = functional.coefficients(x, *parameters(n, C, dtype=wide))
    assert (pre.shape, post.shape, res.shape) == ((*shape, n), (*shape, n), (*shape, n, n))
    assert {pre.dtype, post.dtype, res.dtype} == {wide}
    u = functional.read(x, pre)
    new = functional.write(x, u, post, res)
    assert (u.shape, u.dtype) == (h.shape, dtype)
    assert (new.shape, new.dtype) == (x.shape, dtype)
    assert functional.collapse(new).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_lose_only_their_own_rounding(dtype):
    n, C = 4, 32
    phi, alpha, bias = parameters(n, C)
    x, y = (torch.randn(*s).to(dtype) for s in ((50, n, C), (50, C)))
    wanted = sublayer(x.double(), phi, alpha, bias, y.double())
    got = sublayer(x, phi.float(), alpha.float(), bias.float(), y)
    for ours, other in zip(got, wanted, strict=True):
        tolerance = torch.finfo(dtype).eps * other.abs().max()
        assert (ours.double() - other).abs().max() <= tolerance


def test_non_contiguous_streams():
    n, C = 3, 5
    phi, alpha, bias = parameters(n, C)
    x = torch.randn(C, n, 4, dtype=DOUBLE).permute(2, 1, 0)
    y = torch.randn(C, 4, dtype=DOUBLE).T
    ours = sublayer(x, phi, alpha, bias, y)
    for a, b in zip(ours, sublayer(x.contiguous(), phi, alpha, bias, y.contiguous()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_autocast_and_no_grad_change_nothing():
    n, C = 4, 16
    x, y = torch.randn(8, n, C), torch.randn(8, C)
    p = parameters(n, C, dtype=torch.float32)
    hc = parameters(n, C, dtype=torch.float32)
    hc = (hc[0][: 2 + n, :C].contiguous(), hc[1], hc[2])

    def everything():
        u, new = sublayer(x, *p, y)
        a, b, c = functional.hc_coefficients(x, *hc)
        w = functional.exit_coefficients(x, p[0][:n], p[1][:1], p[2][:n])
        return u, new, a, b, c, w, functional.collapse(x, w), functional.sinkhorn(c)

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything()
    with torch.no_grad():
        without = everything()
    for a, b, c in zip(plain, inside, without, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_branch_in_bfloat16_may_write_to_float32_streams():
    x, post, res = torch.randn(3, 2, 4), torch.ones(3, 2), torch.eye(2).expand(3, 2, 2)
    y = torch.randn(3, 4).bfloat16()
    assert functional.write(x, y, post, res).dtype == torch.float32


def test_auto_is_logged_once_and_a_named_backend_never_falls_back(caplog):
    from manifold_hc import kernels

    kernels._log.cache_clear()
    x, wide = torch.randn(2, 3, 4), torch.randn(2, 3, 4, dtype=DOUBLE)
    with caplog.at_level("INFO", "manifold_hc"):
        for streams in (x, x, wide, wide):
            functional.collapse(streams)
    assert [record.message for record in caplog.records] == [
        'backend "auto": cpu for float32 streams on cpu',
        'backend "auto": reference for float64 streams on cpu',
    ]
    with pytest.raises(
        BackendError, match=r"collapse: backend must be one of auto, triton, cpu, ref"
    ):
        functional.collapse(x, backend="fast")
    with pytest.raises(BackendError, match=r'"cpu" takes streams in float32 or bfloat16 but they'):
        functional.collapse(wide, backend="cpu")


X = torch.randn(2, 3, 4)
PHI, ALPHA, BIAS = (tensor.float() for tensor in parameters(3, 4))
MISTAKES = {
    "a norm to rebuild of other channels": (
        lambda: functional.rebuild(
            X, [], [torch.randn(2, 3)], [functional.InputNorm(torch.ones(1), 1e-6)]
        ),
        ShapeError,
        r"rebuild: the input norm's weight must be \[4\] .* but is \[1\]",
    ),
    "a norm to rebuild in half precision": (
        lambda: functional.rebuild(
            X, [], [torch.randn(2, 3)], [functional.InputNorm(torch.ones(4).half(), 1e-6)]
        ),
        DtypeError,
        "rebuild: the input norm's weight must be float32 or float64",
    ),
    "no streams": (lambda: functional.read(torch.randn(8), torch.randn(3)), ShapeError, "expand"),
    "pre of other streams": (
        lambda: functional.read(X, torch.randn(2, 4)),
        ShapeError,
        r"read: pre must be \[2, 3\] for x \[2, 3, 4\] but is \[2, 4\]",
    ),
    "branch changed its shape": (
        lambda: functional.write(X, torch.randn(2, 5), torch.randn(2, 3), torch.randn(2, 3, 3)),
        ShapeError,
        r"y must be \[2, 4\]",
    ),
    "res not square": (
        lambda: functional.write(X, X[:, 0], torch.randn(2, 3), torch.randn(2, 3, 4)),
        ShapeError,
        "res must be",
    ),
    "res of more tokens": (
        lambda: functional.write(X, X[:, 0], torch.randn(2, 3), torch.randn(5, 3, 3)),
        ShapeError,
        "res must be",
    ),
    "phi transposed": (
        lambda: functional.coefficients(X, PHI.T, ALPHA, BIAS),
        ShapeError,
        r"phi must be \[15, 12\]",
    ),
    "rows of another constraint": (
        lambda: functional.coefficients(X, PHI, ALPHA, BIAS, constraint="identity"),
        ShapeError,
        r"phi must be \[6, 12\]",
    ),
    "phi without alpha": (
        lambda: functional.coefficients(X, PHI, None, BIAS),
        ShapeError,
        "go together",
    ),
    "integer streams": (
        lambda: functional.coefficients(X.int(), PHI, ALPHA, BIAS),
        DtypeError,
        "x must be a real",
    ),
    "complex streams": (
        lambda: functional.collapse(X + 0j),
        DtypeError,
        "x must be a real",
    ),
    "coefficients in bfloat16": (
        lambda: functional.coefficients(X, PHI.bfloat16(), ALPHA, BIAS),
        DtypeError,
        "phi must be float32 or float64",
    ),
    "no iterations": (
        lambda: functional.sinkhorn(torch.randn(3, 3), 0),
        ConfigError,
        "iterations must be a whole number from 1 to 1000 but is 0",
    ),
    "half an iteration": (
        lambda: functional.sinkhorn(torch.randn(3, 3), 1.5),
        ConfigError,
        "iterations must be a whole number from 1 to 1000 but is 1.5",
    ),
    "an epsilon below 0": (
        lambda: functional.coefficients(X, PHI, ALPHA, BIAS, norm_eps=-1.0),
        ConfigError,
        "norm_eps: must be finite in float32 and not negative but is -1.0",
    ),
    "an epsilon that float32 cannot hold": (
        lambda: functional.coefficients(X, PHI, ALPHA, BIAS, norm_eps=1e39),
        ConfigError,
        r"norm_eps: must be finite in float32 and not negative but is 1e\+39",
    ),
    "HC with an epsilon below 0": (
        lambda: functional.hc_coefficients(X, None, None, BIAS[:15], norm_eps=-1.0),
        ConfigError,
        "hc_coefficients: norm_eps must be finite in float32 and not negative but is -1.0",
    ),
    "logits not square": (
        lambda: functional.sinkhorn(torch.randn(3, 4)),
        ShapeError,
        r"logits must be \[..., n, n\]",
    ),
    "zero streams": (lambda: functional.expand(X, 0), ConfigError, "at least 1 but is 0"),
    "scalar": (lambda: functional.expand(torch.tensor(1.0), 2), ShapeError, "scalar"),
    "unknown numerics": (
        lambda: functional.coefficients(X, PHI, ALPHA, BIAS, numerics="v5"),
        ConfigError,
        "must be one of paper, deepseek_v4",
    ),
    "other device": (
        lambda: functional.read(X, torch.randn(2, 3, device="meta")),
        ShapeError,
        "must be on cpu like x but is on meta",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_changes_no_bit(backend):
    """Every operator with a matrix product, which autocast would compute in bfloat16."""
    n, C = 4, 8
    x, y, post = torch.randn(5, n, C), torch.randn(5, C), torch.randn(5, n)
    res, phi, bias = torch.randn(5, n, n), torch.randn(24, n * C), torch.randn(24)
    hc_phi, alpha = torch.randn(2 + n, C), torch.randn(3)

    def results():
        yield functional.write(x, y, post, res, backend)
        yield from functional.coefficients(x, phi, alpha, bias, backend=backend)
        yield from functional.coefficients(
            x, phi[:12], alpha, bias[:12], constraint="kronecker", backend=backend
        )
        yield from functional.hc_coefficients(x, hc_phi, alpha, bias, backend=backend)
        yield functional.exit_coefficients(x, phi[:n], alpha[:1], bias[:n], backend=backend)

    wanted = list(results())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = list(results())
    assert all(map(torch.equal, found, wanted))

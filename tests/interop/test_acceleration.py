"""`accelerate` on models of transformers, against the same models without it."""

import copy
import doctest
import inspect
import io
import pickle
import subprocess
import sys
import warnings
from statistics import median

import pytest
import torch
from torch import nn

import manifold_hc as mhc
from manifold_hc.errors import BackendError, ConfigError
from manifold_hc.interop import Acceleration, accelerate
from tests.interop import models_with_connections as models

FAMILIES = {
    models.deepseek_v4: {"DecoderLayer": 3, "HyperConnection": 6, "HyperHead": 1},
    models.glm5_next: {"DecoderLayer": 2, "HyperConnection": 4},
    models.hy_v4: {"DecoderLayer": 2, "HyperConnection": 4, "HyperHead": 1},
}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)

IDS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def without_foreign_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def built():
    """A function from a family to its model, built once; tests leave it as they find it."""
    kept = {}

    def get(family):
        if family not in kept:
            kept[family] = family()
        return kept[family]

    return get


def passed(model, ids=IDS, **arguments):
    """Output and all gradients of a forward and backward pass with a random cotangent."""
    model.zero_grad()
    found = model(ids, **arguments)
    output = found.logits if hasattr(found, "logits") else found.last_hidden_state
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"output": output.detach(), **gradients}


def joined(tensors):
    """The tensors, those of all scales and of all bases as one vector: their sums may cancel."""
    found = {}
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2].removeprefix("hc_")
        if last in ("scale", "base"):
            tensor = torch.cat([found.get(last, tensor.new_zeros(0)), tensor])
            name = last
        found[name] = tensor
    return found


def assert_close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    found, wanted = joined(found), joined(wanted)
    for name, exact in wanted.items():
        error = (found[name] - exact).abs().max()
        assert error <= tolerance * exact.abs().max(), (name, float(error / exact.abs().max()))


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_the_example_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(accelerate, globs={})
    assert doctest.DocTestRunner(verbose=False).run(example).attempted == 7
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


@every_family
def test_outputs_and_gradients(built, family):
    model = built(family)
    wanted = passed(model)
    with accelerate(model) as handle:
        names = [type(module).__name__ for module in handle.modules.values()]
        counts = {
            kind: sum(map(kind.__eq__, map(ending, names))) for kind in set(map(ending, names))
        }
        assert counts == FAMILIES[family]
        assert len(handle) == sum(counts.values())
        found = passed(model)
    assert_close(found, wanted)
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted)
    assert_equal(passed(model), wanted)


def ending(name):
    return next(e for e in ("DecoderLayer", "HyperConnection", "HyperHead") if name.endswith(e))


@every_family
def test_reference_backend_and_float64(built, family):
    """In float64 both differ by transformers' coefficients alone, which it computes in float32."""
    model = copy.deepcopy(built(family)).double()
    model.set_experts_implementation("eager")
    wanted = passed(model)
    with accelerate(model, backend="reference"):
        assert_close(passed(model), wanted, tolerance=2e-5)


@every_family
def test_bfloat16_is_closer_to_the_truth_than_transformers(family, tmp_path):
    """Mean over four inputs: the branches round as often as the connections, and in both."""
    family(**models.SMOOTH).save_pretrained(tmp_path)
    model = type(family()).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    outputs, gradients = [], []
    for seed in range(4):
        ids = torch.randint(61, IDS.shape, generator=torch.Generator().manual_seed(seed))
        wanted, theirs = passed(copy.deepcopy(model).float(), ids), passed(model, ids)
        with accelerate(model):
            ours = passed(model, ids)
        assert ours["output"].dtype == torch.bfloat16
        errors = [[error(found[n], wanted[n]) for n in wanted] for found in (ours, theirs)]
        outputs.append([own[0] for own in errors])
        gradients.append([median(own) for own in errors])
    for found in (outputs, gradients):
        our_mean, their_mean = torch.tensor(found).mean(0)
        assert our_mean <= 1.02 * their_mean <= 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Branches in a narrow dtype write into float32 streams; the CPU kernels take no float16."""
    model = models.deepseek_v4(**models.SMOOTH)
    exact = passed(model)
    with torch.autocast("cpu", dtype=dtype):
        theirs = passed(model)
        with accelerate(model):
            ours = passed(model)
    assert error(ours["output"], exact["output"]) <= 1.1 * error(theirs["output"], exact["output"])
    errors = [[error(found[n], exact[n]) for n in exact] for found in (ours, theirs)]
    assert median(errors[0]) <= 1.1 * median(errors[1]) < 0.05


def error(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def layer_of(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))


def test_one_rounding_of_every_bfloat16_result(built):
    """u, and x' of a write, are the exact values rounded once; coefficients stay in float32."""
    connection = copy.deepcopy(layer_of(built(models.deepseek_v4)).attn_hc)
    n, C = 4, 32
    x = torch.randn(2, 50, n, C, generator=torch.Generator().manual_seed(5)).bfloat16()
    y = torch.randn(2, 50, C, generator=torch.Generator().manual_seed(6)).bfloat16()
    their_post, their_comb, their_u = copy.deepcopy(connection).double()(x.double())
    exact_write = their_post.unsqueeze(-1) * y.double().unsqueeze(-2) + their_comb.mT @ x.double()
    accelerate(connection)
    post, comb, u = connection(x)
    assert post.dtype == comb.dtype == torch.float32
    assert (post - their_post).abs().max() < 1e-5
    assert (comb - their_comb).abs().max() < 1e-5
    written = mhc.functional.write(x, y, post, comb.mT)
    for found, exact in ((u, their_u), (written, exact_write)):
        assert found.dtype == torch.bfloat16
        # Half a unit in the last place of eight bits, and the error of float32 arithmetic.
        assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


def test_generation_gives_the_same_tokens(built):
    model = built(models.deepseek_v4)
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(IDS, **options)
    with accelerate(model):
        assert torch.equal(model.generate(IDS, **options), wanted)
        assert torch.equal(model.generate(IDS, use_cache=False, **options)[:, :12], wanted[:, :12])


@pytest.mark.parametrize("family", [models.glm5_next, models.hy_v4], ids=lambda f: f.__name__)
def test_decoding_with_a_cache(built, family):
    model = built(family)

    def decode():
        with torch.no_grad():
            first = model(IDS[:, :7], use_cache=True)
            return model(IDS[:, 7:8], past_key_values=first.past_key_values).last_hidden_state

    wanted = decode()
    with accelerate(model):
        assert_close({"h": decode()}, {"h": wanted})


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@every_family
def test_gradient_checkpointing(family, reentrant):
    model = family().train()
    accelerate(model)
    wanted = passed(model, use_cache=False)
    calls = []
    layer_of(model).mlp.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(passed(model, use_cache=False), wanted)
    assert len(calls) == 2


def test_recorded_outputs_are_those_of_transformers(built):
    model = built(models.deepseek_v4)
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    wanted = model(IDS, **asked)
    with accelerate(model):
        found = model(IDS, **asked)
    for key in ("hidden_states", "attentions", "router_logits"):
        pairs = zip(found[key], wanted[key], strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    assert len(wanted.hidden_states) == 4


@every_family
def test_saved_files_are_the_same_and_load_as_a_plain_model(built, family, tmp_path):
    model = built(family)
    model.save_pretrained(tmp_path / "plain")
    with accelerate(model):
        keys = list(model.state_dict())
        model.save_pretrained(tmp_path / "accelerated")
    assert keys == list(model.state_dict())
    plain = {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()}
    accelerated = {file.name: file.read_bytes() for file in (tmp_path / "accelerated").iterdir()}
    assert plain == accelerated
    again = type(model).from_pretrained(tmp_path / "accelerated").eval()
    with pytest.raises(ConfigError, match=r"Acceleration\.of"):
        Acceleration.of(again)
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@every_family
def test_copies_are_accelerated_and_independent(family, duplicate):
    model = family()
    plain = passed(model)
    handle = accelerate(model)
    accelerated = passed(model)
    other = duplicate(model)
    handle.remove()
    assert_equal(passed(model), plain)
    assert_equal(passed(other), accelerated)
    own = Acceleration.of(other)
    assert repr(own).count("DecoderLayer") == 1
    own.remove()
    assert_equal(passed(other), plain)


@every_family
def test_removal_leaves_no_trace(family):
    model = family()
    before = [(type(m), dict(vars(m)), dict(m._modules)) for m in model.modules()]
    handle = accelerate(model)
    with pytest.raises(ConfigError, match=r"accelerated already; Acceleration\.of"):
        accelerate(model)
    handle.remove()
    handle.remove()
    after = [(type(m), dict(vars(m)), dict(m._modules)) for m in model.modules()]
    assert all(
        a[0] is b[0] and a[1].keys() == b[1].keys() and a[2] == b[2]
        for a, b in zip(after, before, strict=True)
    )
    assert len(handle) == 0
    assert repr(handle) == "Acceleration(removed)"


def test_an_error_inside_the_block_restores_the_model():
    model = models.hy_v4()
    with pytest.raises(KeyError), accelerate(model):
        raise KeyError
    accelerate(model).remove()


def test_a_class_that_changed_since_is_named_and_nothing_is_restored():
    model = models.hy_v4()
    handle = accelerate(model)
    layer, kind = layer_of(model), type(layer_of(model))
    layer.__class__ = type("Sharded", (kind,), {})
    with pytest.raises(ConfigError, match=r"layers\.0 must have .* but has Sharded"):
        handle.remove()
    layer.__class__ = kind
    assert len(Acceleration.of(model)) == len(handle)
    handle.remove()


@every_family
def test_hooks_of_a_connection_run_and_may_replace_its_output(family):
    model = family()
    connection = layer_of(model).ffn_hc
    seen = []

    def double_the_input(module, args, output):
        seen.append(len(output))
        return (*output[:-1], 2 * output[-1])

    connection.register_forward_hook(double_the_input)
    wanted = passed(model)
    with accelerate(model):
        assert_close(passed(model), wanted)
    assert seen == ([2, 2] if family is models.hy_v4 else [3, 3])


def test_a_wrapped_connection_is_called():
    """As PEFT wraps a module that it trains whole."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = models.deepseek_v4()
    wanted = passed(model)["output"]
    layer_of(model).attn_hc = Wrapper(layer_of(model).attn_hc)
    with accelerate(model) as handle:
        assert len(handle) == 10
        assert_close({"h": passed(model)["output"]}, {"h": wanted})


def test_hooks_of_the_package_accelerate_stay():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    model = models.hy_v4()
    layer = layer_of(model)
    add_hook_to_module(layer, Count())
    wanted = passed(model)
    with accelerate(model):
        found = passed(model)
        assert layer._old_forward.__func__ is type(layer).forward
    assert_close(found, wanted)
    assert not torch.equal(found["output"], wanted["output"])
    assert_equal(passed(model), wanted)
    assert Count.calls == 3


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharding_before_and_after(mesh):
    """FSDP2 changes the class of a module too."""
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        for module in (layer_of(model), model):
            fully_shard(module, mesh=mesh)

    def output(model):
        return model(IDS).last_hidden_state

    first, second = models.hy_v4(), models.hy_v4()
    plain = output(first)
    handle = accelerate(first)
    wanted = output(first)
    shard(first)
    assert torch.equal(output(first), wanted)
    with pytest.raises(ConfigError, match="fully_shard"):
        handle.remove()
    shard(second)
    with accelerate(second):
        assert torch.equal(output(second), wanted)
    assert torch.equal(output(second), plain)
    assert not torch.equal(wanted, plain)


def test_compiled_layers():
    """In a process without shape checks, which cannot be compiled."""
    script = "tests.interop.compiled_layers"
    done = subprocess.run([sys.executable, "-m", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled 2 graphs\n"


def test_a_model_on_the_meta_device_and_another_default_dtype():
    """The comparison of the forwards needs numbers, which such defaults would not give."""
    model = models.hy_v4()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert len(accelerate(model.to("meta"))) == 7
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "named"), [("llama", "str"), (nn.Linear, "the class Linear"), (None, "NoneType")]
)
def test_an_argument_that_is_no_module_is_refused(given, named):
    with pytest.raises(ConfigError, match=rf"must be a torch\.nn\.Module but is {named}; load it"):
        accelerate(given)


def test_a_root_that_is_accelerated_already_is_named_by_its_class():
    (connection,) = (m for n, m in models.hy_v4().named_modules() if n.endswith("0.attn_hc"))
    with accelerate(connection), pytest.raises(ConfigError, match=r": HYV4\w+ is accelerated alr"):
        accelerate(connection)


@pytest.mark.parametrize("model_type", ["llama", "qwen4_exp"])
def test_an_unknown_model_is_refused_with_the_known_ones(model_type):
    model = nn.Linear(2, 2)
    model.config = type("Config", (), {"model_type": model_type})()
    with pytest.raises(ConfigError, match=rf"deepseek_v4, glm5_next, hy_v4.* got {model_type}"):
        accelerate(model)
    if model_type == "qwen4_exp":
        with pytest.raises(ConfigError, match="low-rank gates"):
            accelerate(model)


def test_an_unknown_backend_is_refused(built):
    with pytest.raises(BackendError, match="auto, triton, cpu, reference but is 'fast'"):
        accelerate(built(models.hy_v4), backend="fast")


def test_a_patched_forward_is_refused(monkeypatch):
    model = models.hy_v4()
    layer = layer_of(model)
    layer.forward = layer.forward
    with pytest.raises(ConfigError, match=r"layers\.0 must have the forward of HYV4DecoderLayer"):
        accelerate(model)
    del layer.forward
    kind = type(layer.attn_hc)
    monkeypatch.setattr(kind, "forward", lambda self, x: kind.forward(self, x))
    with pytest.raises(ConfigError, match=r"attn_hc must have the forward of HYV4HyperConn"):
        accelerate(model)
    monkeypatch.undo()
    accelerate(model)


def test_a_patched_class_of_layers_is_refused(monkeypatch):
    model = models.hy_v4()
    kind = type(layer_of(model))
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: None)
    with pytest.raises(ConfigError, match="patched in or overridden"):
        accelerate(model)


CHANGES = {
    "transposed": ("DecoderLayer", ".transpose(-1, -2)", "", "its results differ"),
    "no post": ("DecoderLayer", "post.to(dtype).unsqueeze(-1) * mlp", "mlp", "its results differ"),
    "factor of post": ("HyperConnection", "2 * torch.sig", "torch.sig", "its results differ"),
    "epsilon of pre": (
        "HyperConnection",
        "pre_b) + self.hc_eps",
        "pre_b)",
        "its results differ",
    ),
    "one iteration fewer": ("HyperConnection", "iters - 1", "iters - 2", "its results differ"),
    "head": ("HyperHead", "+ self.eps", "", "its results differ"),
    "argument of the branch": (
        "DecoderLayer",
        ", input_ids=input_ids)",
        ")",
        "it calls its submodules in another way",
    ),
    "argument of the layer": (
        "DecoderLayer",
        "        **kwargs: Unpack[TransformersKwargs],",
        "        depth=0, **kwargs,",
        "its forward takes hidden_states, input_ids, depth, kwargs",
    ),
    "submodule": (
        "DecoderLayer",
        "self.ffn_hc = ",
        "self.gate = nn.Identity(); self.ffn_hc = ",
        "it has other submodules, gate first",
    ),
    "attribute": ("DecoderLayer", "dtype = hidden", "self.scale; dtype = hidden", "AttributeError"),
}
"""A change of transformers' code: class, text, its replacement, and the reason of the refusal."""


@pytest.mark.parametrize("change", CHANGES)
def test_another_version_of_transformers_is_refused(monkeypatch, change):
    """Each case is the installed source of one class with one change, in a class of its own."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    ending, text, replacement, reason = CHANGES[change]
    source = inspect.getsource(getattr(modeling, f"DeepseekV4{ending}"))
    assert text in source
    names = dict(vars(modeling))
    exec(source.replace(text, replacement), names)
    monkeypatch.setattr(modeling, f"DeepseekV4{ending}", names[f"DeepseekV4{ending}"])
    model = models.deepseek_v4()
    with pytest.raises(ConfigError, match=f"DeepseekV4{ending} of transformers 5.* {reason}"):
        accelerate(model)
    with pytest.raises(ConfigError, match=r"Acceleration\.of"):
        Acceleration.of(model)


def test_the_unchanged_source_in_a_class_of_its_own_is_accepted(monkeypatch):
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    names = dict(vars(modeling))
    exec(inspect.getsource(modeling.DeepseekV4DecoderLayer), names)
    monkeypatch.setattr(modeling, "DeepseekV4DecoderLayer", names["DeepseekV4DecoderLayer"])
    assert len(accelerate(models.deepseek_v4())) == 10

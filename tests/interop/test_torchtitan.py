"""The model for torchtitan against torchtitan's own; one process finds the facts of all tests."""

import contextlib
import doctest
import io
from importlib.util import find_spec

import pytest
import torch

from manifold_hc import ConnectionConfig
from manifold_hc.training import preset
from manifold_hc.training.optimizer import learning_rate
from tests.training.runs import in_process

if find_spec("torchtitan") is None:
    pytest.skip("needs torchtitan 0.3.0: see docs/torchtitan.md", allow_module_level=True)

CONNECTIONS = {
    "residual": ConnectionConfig(kind="residual"),
    "hc": ConnectionConfig(kind="hc"),
    "mhc": ConnectionConfig(kind="mhc"),
    "three streams": ConnectionConfig(streams=3),
    "static": ConnectionConfig(dynamic=False),
    "deepseek_v4": ConnectionConfig(numerics="deepseek_v4"),
    "deepseek_v41": ConnectionConfig(numerics="deepseek_v41"),
}
COUNTS = {
    "3b": ("612.33M", "2.9729B"),
    "9b": ("1660.66M", "9.1785B"),
    "27b": ("4138.87M", "27.048B"),
}
REFUSED = {
    "--parallelism.tensor_parallel_degree 2": "tensor_parallel_degree: must be 1",
    "--parallelism.spmd_backend spmd_types": "spmd_backend: must be partial_dtensor",
    "--training.disable_cuda_graphs --parallelism.pipeline_parallel_degree 2 "
    "--connection.numerics deepseek_v41": "must be 1 with single_pass",
    "--connection.streams 0": "streams: must be at least 1",
}


@pytest.fixture(scope="module")
def facts():
    answer, messages = in_process(find_facts)
    assert isinstance(answer, dict), (answer, messages)
    return answer


def find_facts():
    torch.set_num_threads(1)
    from tests.interop import torchtitan_cpu

    torchtitan_cpu.use_float32_experts()
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")
    return {
        "differences": step_0_differences(),
        "counts": {name: count(f"mhc_{name}") for name in COUNTS},
        "added": {kind: count(f"{kind}_3b")[1] for kind in ("residual", "hc", "mhc")},
        "initial": initial_values(),
        "refused": {extra: refusal(extra) for extra in REFUSED},
        "rates": step_schedule(),
        "mistyped": mistyped_configuration(),
        "specs": specifications(),
        "sharded": two_passes(),
    }


def own_spec(depths=0):
    from torchtitan.models.deepseek_v3 import model_registry

    return model_registry("debugmodel", num_mtp_layers=depths)


def built(spec):
    """The model with initial weights, made as torchtitan makes it."""
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model.train()


def step_0_differences():
    """Largest difference to torchtitan's logits and gradients, relative to the largest value."""
    from tests.interop.torchtitan_configs import tiny_spec

    cases = {name: (tiny_spec(), connection) for name, connection in CONNECTIONS.items()}
    cases["multi-token prediction"] = (own_spec(depths=1), CONNECTIONS["mhc"])
    return {name: difference(*case) for name, case in cases.items()}


def difference(spec, connection):
    from manifold_hc.interop.torchtitan import with_connections

    theirs, ours = built(spec), built(with_connections(spec, connection))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(".streams.stack." in key for key in missing), missing
    assert not unexpected
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(320, (2, 16), generator=generator)
    weights = torch.randn(2, 16, spec.model.vocab_size, generator=generator)
    found, expected = run(ours, tokens, weights), run(theirs, tokens, weights)
    return [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    ]


def run(model, tokens, weights):
    """Logits, those of multi-token prediction, and the gradient of the embedding."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    masks = model.get_attention_masks(positions)
    outputs = model(tokens, positions=positions, attention_masks=masks)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum((output * weights).sum() for output in outputs).backward()
    return [*(output.detach() for output in outputs), model.tok_embeddings.weight.grad]


def count(name):
    """Active and total parameters as the paper counts them."""
    from manifold_hc.interop.torchtitan import config_registry

    config = getattr(config_registry, name)().model_spec.model
    with torch.device("meta"):
        model = config.build()
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    routed = sum(size for key, size in sizes.items() if "routed_experts" in key)
    moe = config.layers[-1].moe
    idle = routed - routed * moe.router.top_k // moe.num_experts
    return sum(sizes.values()) - idle - sizes["tok_embeddings.weight"], sum(sizes.values())


def initial_values():
    """Coefficients of connections and of a block's matrix when training.dtype is bfloat16."""
    from manifold_hc.interop.torchtitan import with_connections

    torch.set_default_dtype(torch.bfloat16)
    try:
        model = built(with_connections(own_spec(), CONNECTIONS["deepseek_v4"]))
    finally:
        torch.set_default_dtype(torch.float32)
    found = {
        name: (parameter.dtype, parameter.shape, parameter.float().mean().item())
        for name, parameter in model.named_parameters()
        if ".streams." in name or name == "lm_head.weight"
    }
    return {name: (str(dtype), list(shape), mean) for name, (dtype, shape, mean) in found.items()}


def refusal(extra):
    """Exit status and message of torchtitan's command line."""
    from torchtitan.config import ConfigManager

    printed = io.StringIO()
    module = "--module manifold_hc.interop.torchtitan --config deepseek_v3_mhc_debug"
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            ConfigManager().parse_args([*module.split(), *extra.split()])
    except SystemExit as error:
        return error.code, " ".join(printed.getvalue().replace("│", " ").split())
    return 0, ""


def mistyped_configuration():
    """Message of torchtitan for a configuration that does not exist."""
    from torchtitan.config import ConfigManager

    try:
        ConfigManager().parse_args(
            ["--module", "manifold_hc.interop.torchtitan", "--config", "mhc_3"]
        )
    except ValueError as error:
        return str(error)
    return ""


def step_schedule():
    """Rates of both parameter groups after some steps of the 27B recipe, and their decay."""
    from manifold_hc.interop.torchtitan import config_registry

    config = config_registry.mhc_27b()
    model = built(own_spec())
    optimizers = config.optimizer.build(model_parts=[model])
    schedule = config.lr_scheduler.build(optimizers=optimizers, training_steps=10_000)
    seen = {}
    for step in range(10_000):
        if step in (0, 1999, 7999, 8000, 9000):
            seen[step] = next(iter(schedule.get_metrics().values()))
        for scheduler in schedule:
            scheduler.step()
    decays = {
        name: group["weight_decay"]
        for group in optimizers.optimizers[0].param_groups
        for name in group["param_names"]
    }
    return seen, {name: decays[name] for name in ("norm.weight", "layers.0.attention.wq.weight")}


def specifications():
    from torchtitan.models.llama3 import model_registry

    from manifold_hc.errors import ConfigError
    from manifold_hc.interop.torchtitan import with_connections

    spec = own_spec()
    mhc = with_connections(spec)
    residual = with_connections(mhc, CONNECTIONS["residual"])
    try:
        with_connections(model_registry("debugmodel", attn_backend="flex"))
        message = None
    except ConfigError as error:
        message = str(error)
    return {
        "unchanged": not hasattr(spec.model.layers[0], "streams"),
        "replaced": residual.model.layers[0].streams.connection.kind,
        "adapters": [s.state_dict_adapter is not None for s in (mhc, residual)],
        "llama3": message,
        "example": example(with_connections),
    }


def example(function):
    """Examples in a docstring, and those that fail."""
    (found,) = doctest.DocTestFinder(recurse=False).find(function, globs={})
    results = doctest.DocTestRunner(verbose=False).run(found, out=lambda text: None)
    return results.attempted, results.failed


def two_passes():
    """Gradients of two losses whose forward passes both precede backward, whole and sharded."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims

    from manifold_hc.interop.torchtitan import with_connections
    from manifold_hc.interop.torchtitan.parallelize import parallelize
    from tests.interop.torchtitan_configs import tiny_spec

    spec = with_connections(tiny_spec())
    whole, sharded = built(spec), built(spec)
    sharded.load_state_dict(whole.state_dict())
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    parallelize(
        sharded,
        parallel_dims=ParallelDims.from_config(parallelism, 1),
        training=TrainingConfig(mixed_precision_param="float32"),
        parallelism=parallelism,
        compile_config=CompileConfig(),
        ac_config=None,
        dump_folder="",
    )
    tokens = torch.arange(32).view(2, 16)
    positions = torch.arange(16).expand_as(tokens)
    for model in (whole, sharded):
        masks = model.get_attention_masks(positions)
        losses = [model(t, positions, masks).square().sum() for t in (tokens, tokens + 32)]
        for loss in losses:
            loss.backward()
    grads = (
        [parameter.grad for parameter in whole.parameters()],
        [parameter.grad.full_tensor() for parameter in sharded.parameters()],
    )
    names = [name for name, _ in whole.named_parameters()]
    found = {
        name: ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()
        for name, a, b in zip(names, *grads, strict=True)
    }
    destroy_process_group()
    return found


@pytest.mark.parametrize("name", [*CONNECTIONS, "multi-token prediction"])
def test_the_function_at_step_0_is_torchtitans(facts, name):
    differences = facts["differences"][name]
    # hc sums its streams, and the norms' epsilon weighs less; deepseek_v4's rows do not sum to 1.
    bound = {"residual": 1e-6}.get(name, 1e-5)
    assert max(differences) < bound


@pytest.mark.parametrize("name", COUNTS)
def test_the_papers_sizes_to_every_printed_digit(facts, name):
    active, total = facts["counts"][name]
    assert (f"{active / 1e6:.2f}M", f"{total / 1e9:.5g}B") == COUNTS[name]


def test_connections_add_the_papers_number_of_parameters(facts):
    added, C = facts["added"], 1280
    assert added["mhc"] - added["residual"] == 24 * (96 * C + 27)
    assert added["hc"] - added["residual"] == 24 * (6 * C + 27)


def test_connections_start_as_a_residual_network_in_float32(facts):
    initial = facts["initial"]
    assert initial["lm_head.weight"][0] == "torch.bfloat16"
    assert initial.pop("lm_head.weight")
    assert {dtype for dtype, *_ in initial.values()} == {"torch.float32"}
    assert initial["layers.5.streams.stack.connections.11.maps.phi"][1:] == ([24, 1024], 0.0)
    assert initial["layers.0.streams.stack.connections.0.maps.alpha"][1:] == (
        [3],
        pytest.approx(0.01),
    )
    # The exit of deepseek_v4 belongs to the last block.
    assert [name for name in initial if ".exit." in name] == [
        f"layers.5.streams.stack.exit.{name}" for name in ("phi", "alpha", "bias")
    ]
    assert len(initial) == 3 * 12 + 3


@pytest.mark.parametrize("extra", REFUSED)
def test_settings_without_support_end_with_status_2_and_the_reason(facts, extra):
    status, message = facts["refused"][extra]
    assert status == 2
    assert REFUSED[extra] in message


def test_a_mistyped_configuration_gets_the_list_of_those_that_exist(facts):
    names = [f"{kind}_{size}" for kind in ("residual", "hc", "mhc") for size in COUNTS]
    names += [f"deepseek_v3_{kind}_debug" for kind in ("residual", "hc", "mhc")]
    assert facts["mistyped"].endswith(f"Available config functions: {sorted(names)}")


def test_the_papers_schedule_and_decay(facts):
    rates, decays = facts["rates"]
    recipe = preset("27b").optimizer
    assert rates == pytest.approx(
        {step: learning_rate(step, 10_000, recipe) for step in rates}, rel=1e-12
    )
    assert decays == {"norm.weight": 0.0, "layers.0.attention.wq.weight": 0.1}


def test_a_specification_gets_connections_and_others_later(facts):
    found = facts["specs"]
    assert found["unchanged"]
    assert found["replaced"] == "residual"
    assert found["adapters"] == [False, True]
    assert "must be torchtitan's DeepSeek-V3" in found["llama3"]
    assert found["example"] == (5, 0)


def test_sharded_connections_are_gathered_again_for_a_second_backward(facts):
    assert max(facts["sharded"].values()) < 1e-5

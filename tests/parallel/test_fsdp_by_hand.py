"""FSDP2 applied by hand: to branches, connections and the root of a model."""

import math
import os
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import manifold_hc as mhc
from manifold_hc import interop
from manifold_hc.errors import DtypeError
from manifold_hc.functional import collapse, expand
from manifold_hc.maps import Maps
from manifold_hc.models import Experts, ExpertsConfig
from tests.parallel.ranks import run_on_ranks

C, SUBLAYERS = 16, 4
NARROW = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
WIDE = MixedPrecisionPolicy()
PAPER = mhc.ConnectionConfig(phi_std=0.02)
LEARNED_EXIT = mhc.ConnectionConfig(phi_std=0.02, numerics="deepseek_v4")
COEFFICIENTS = ("phi", "alpha", "bias")


class Stacked(nn.Module):
    """Embedding, branches and their norms, connections as a Stack, head."""

    def __init__(self, config=PAPER, recompute=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(17, C)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(C, 24), nn.GELU(), nn.Linear(24, C)) for _ in range(SUBLAYERS)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(C, eps=1e-6) for _ in range(SUBLAYERS))
        self.connect(config, recompute)
        self.head = nn.Linear(C, 17)

    def connect(self, config, recompute):
        self.stack = mhc.Stack(C, config, SUBLAYERS, recompute)
        self.units = [self.stack]

    def forward(self, tokens):
        h = self.stack(self.embedding(tokens), list(self.branches), list(self.norms))
        return self.head(h)


class Single(Stacked):
    """The same model with single connections instead of a Stack."""

    def connect(self, config, recompute):
        self.connections = nn.ModuleList(mhc.Connection(C, config, i) for i in range(SUBLAYERS))
        self.units = self.connections

    def forward(self, tokens):
        x = expand(self.embedding(tokens), PAPER.n)
        for sublayer in zip(self.connections, self.branches, self.norms, strict=True):
            connection, branch, norm = sublayer
            x = connection(x, nn.Sequential(norm, branch))
        return self.head(collapse(x))


MODELS = {
    "stack": Stacked,
    "recomputed, with a learned exit": lambda: Stacked(LEARNED_EXIT, recompute=2),
    "connections": Single,
}


def sharded(model, branches, coefficients, root):
    """Apply FSDP2 with these policies; connections form no unit if theirs is None."""
    for branch in model.branches:
        fully_shard(branch, mp_policy=branches)
    if coefficients is not None:
        for unit in model.units:
            fully_shard(unit, mp_policy=coefficients)
    return fully_shard(model, mp_policy=root)


RECIPES = {
    "float32": (WIDE, WIDE, WIDE),
    "bfloat16": (NARROW, WIDE, NARROW),
    "bfloat16 branches": (NARROW, None, WIDE),
}
STREAMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16 branches": torch.float32}


def train(model):
    """Train two steps on the local tokens; return losses, gradients and dtypes in the maps."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    tokens = torch.randint(0, 17, (4, 8), generator=torch.Generator().manual_seed(1))
    saw = set()
    for maps in (module for module in model.modules() if isinstance(module, Maps)):
        maps.register_forward_hook(
            lambda maps, _, made: saw.add((maps.phi.dtype, made.res.dtype, made.x.dtype))
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, gradients = [], []
    for _ in range(2):
        loss = model(tokens.chunk(size)[rank]).float().logsumexp(-1).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, saw


def whole(gradient):
    full = getattr(gradient, "full_tensor", None)
    return full() if full else gradient if gradient is None else gradient.clone()


def init_gloo():
    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module .* returned a view"
    )  # as nn.Linear does
    dist.init_process_group("gloo")


def every_recipe():
    init_gloo()
    found = {}
    for kind, make in MODELS.items():
        for recipe, policies in RECIPES.items():
            losses, gradients, saw = train(sharded(make(), *policies))
            numbers = [
                {name: (str(g.dtype), g.tolist()) for name, g in step.items() if g is not None}
                for step in gradients
            ]
            found[kind, recipe] = losses, numbers, saw
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def trained():
    """Mean losses, gradients and dtypes in the maps, by kind of model and recipe."""
    answers = run_on_ranks(2, every_recipe)
    return {
        key: (
            [sum(pair) / 2 for pair in zip(*(answer[key][0] for answer in answers), strict=True)],
            *answers[0][key][1:],
        )
        for key in answers[0]
    }


@pytest.mark.parametrize("kind", MODELS)
def test_float32_equals_one_process(trained, kind):
    losses, gradients, _ = trained[kind, "float32"]
    wanted_losses, wanted_gradients, _ = train(MODELS[kind]())
    assert losses == pytest.approx(wanted_losses, abs=1e-6)
    for found, wanted in zip(gradients, wanted_gradients, strict=True):
        there = {name for name, gradient in wanted.items() if gradient is not None}
        assert found.keys() == there
        for name in there:
            numbers = torch.tensor(found[name][1])
            torch.testing.assert_close(numbers, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("recipe", "streams"), list(STREAMS.items()))
def test_coefficients_are_float32_and_streams_as_wanted(trained, kind, recipe, streams):
    _, gradients, saw = trained[kind, recipe]
    assert saw == {(torch.float32, torch.float32, streams)}
    for step in gradients:
        assert {dtype for dtype, _ in step.values()} == {"torch.float32"}
        assert sum(name.endswith(COEFFICIENTS) for name in step) >= 3 * SUBLAYERS


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_equals_one_process_in_bfloat16(trained, kind):
    """Compared before the first update, which rounds the bfloat16 weights of one process."""
    losses, gradients, _ = trained[kind, "bfloat16"]
    wanted_losses, wanted_gradients, _ = train(MODELS[kind]().to(torch.bfloat16))
    assert losses[0] == pytest.approx(wanted_losses[0], abs=1e-6)
    for name, (_, numbers) in gradients[0].items():
        wanted = wanted_gradients[0][name].float()
        assert (torch.tensor(numbers) - wanted).norm() <= 0.05 * wanted.norm() + 1e-5, name


def routed():
    """Dtypes of weight, gates and gradient of a router in a bfloat16 branch."""
    init_gloo()
    branch = Experts(C, ExpertsConfig(routed=4))
    fully_shard(branch.router)
    fully_shard(branch, mp_policy=NARROW)
    dtypes = []
    branch.router.register_forward_hook(
        lambda router, _, made: dtypes.extend([router.weight.dtype, made[0].dtype])
    )
    branch(torch.randn(2, 4, C)).sum().backward()
    dist.destroy_process_group()
    return [*dtypes, branch.router.weight.grad.dtype]


def test_a_router_is_a_unit_inside_its_branch():
    assert run_on_ranks(2, routed) == [[torch.float32] * 3] * 2


STARTS = {
    "hc": mhc.ConnectionConfig(kind="hc"),
    "mhc": mhc.ConnectionConfig(),
    "one stream": mhc.ConnectionConfig(streams=1),
    "learned exit": mhc.ConnectionConfig(numerics="deepseek_v4"),
}

CHECKPOINT = {
    **{
        f"layers.0.hc_{sublayer}_{name}": torch.arange(math.prod(shape)).view(shape).float()
        for sublayer in ("attn", "ffn")
        for name, shape in (("fn", (24, 4 * C)), ("base", (24,)), ("scale", (3,)))
    },
    "hc_head_fn": torch.arange(16.0 * C).view(4, 4 * C),
    "hc_head_base": torch.arange(4.0),
    "hc_head_scale": torch.tensor([7.0]),
}


def from_meta():
    """Initial values and loaded values of stacks that are sharded on the meta device."""
    init_gloo()
    found = {}
    for name, config in STARTS.items():
        with torch.device("meta"):
            stack = mhc.Stack(C, config, 2)
        fully_shard(stack).to_empty(device="cpu")
        stack.reset_parameters()
        found[name] = [parameter.full_tensor().tolist() for parameter in stack.parameters()]
    interop.load_deepseek(stack, CHECKPOINT)
    found["loaded"] = [parameter.full_tensor().tolist() for parameter in stack.parameters()]
    dist.destroy_process_group()
    return found


def test_a_sharded_stack_from_the_meta_device_starts_as_any_other():
    wanted = {
        name: [parameter.tolist() for parameter in mhc.Stack(C, config, 2).parameters()]
        for name, config in STARTS.items()
    }
    loaded = mhc.Stack(C, STARTS["learned exit"], 2)
    interop.load_deepseek(loaded, CHECKPOINT)
    wanted["loaded"] = [parameter.tolist() for parameter in loaded.parameters()]
    assert run_on_ranks(2, from_meta) == [wanted] * 2


def refusals():
    """Error messages for a bfloat16 policy on coefficients and on a router."""
    init_gloo()
    tokens, experts = torch.zeros(2, 4, dtype=torch.int64), Experts(C, ExpertsConfig(routed=4))
    model = Stacked(LEARNED_EXIT)
    for connection in model.stack.connections:
        fully_shard(connection)
    calls = {
        "Maps": (sharded(Single(), NARROW, None, NARROW), tokens),
        "LearnedExit": (fully_shard(model, mp_policy=NARROW), tokens),
        "Router": (fully_shard(experts, mp_policy=NARROW), torch.randn(2, 4, C)),
    }
    told = {}
    for name, (sharded_model, given) in calls.items():
        try:
            sharded_model(given)
        except DtypeError as error:
            told[name] = str(error)
    dist.destroy_process_group()
    return told


def test_a_policy_that_casts_coefficients_is_named_with_the_repair():
    coefficients = "the stack, or on each connection outside of one,"
    wanted = {
        "Maps": ("bias", coefficients),
        "LearnedExit": ("phi", coefficients),
        "Router": ("weight", "each router"),
    }
    for told in run_on_ranks(2, refusals):
        assert told.keys() == wanted.keys()
        for name, (parameter, unit) in wanted.items():
            assert re.fullmatch(
                f"{name}: {parameter} must be float32 or float64 but is torch.bfloat16, to which "
                f"a sharding policy casts it; call fully_shard on {unit} without a policy, before "
                "the fully_shard of the model",
                told[name],
            )

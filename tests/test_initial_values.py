"""Every module initialises itself from torch's random state, under any default dtype."""

import math

import pytest
import torch
from torch import nn

import manifold_hc as mhc
from manifold_hc.config import ConnectionConfig
from manifold_hc.maps import LearnedExit, Maps, ResidualMaps
from manifold_hc.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    Experts,
    ExpertsConfig,
    GatedFeedForward,
    LatentAttention,
)
from manifold_hc.models.experts import RoutedExperts, Router

C = 24
HC = ConnectionConfig(kind="hc", phi_std=0.2)
V4 = ConnectionConfig(numerics="deepseek_v4", phi_std=0.2)
MIXTURE = ExpertsConfig(routed=6, active=2, width=8)
SIZES = {
    "channels": C,
    "blocks": 2,
    "feed_forward": 40,
    "attention": AttentionConfig(heads=2, head_size=8, rotary_size=4, latent_size=10),
}

MODULES = {
    "maps": lambda: Maps(C, V4, 1),
    "hc's maps": lambda: Maps(C, HC, 3),
    "static maps": lambda: Maps(C, ConnectionConfig(dynamic=False), 1),
    "residual maps": ResidualMaps,
    "exit": lambda: LearnedExit(C, V4),
    "connection": lambda: mhc.Connection(C, V4, 2),
    "stack": lambda: mhc.Stack(C, V4, 3),
    "part of a stack": lambda: mhc.Stack(C, V4, 3).part([1, 2]),
    "router": lambda: Router(C, 6, 2),
    "routed experts": lambda: RoutedExperts(C, MIXTURE),
    "experts": lambda: Experts(C, MIXTURE),
    "attention": lambda: LatentAttention(C, SIZES["attention"], norm_eps=1e-6),
    "feed-forward": lambda: GatedFeedForward(C, 40),
    "decoder": lambda: Decoder(DecoderConfig(**SIZES), V4),
    "decoder with experts": lambda: Decoder(DecoderConfig(**SIZES, experts=MIXTURE), V4),
    "decoder without shared ones": lambda: Decoder(
        DecoderConfig(**SIZES, experts=ExpertsConfig(routed=6, shared=0, width=8)), V4
    ),
}


def tensors(module):
    """Parameters and buffers, those that no checkpoint holds too."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def poison(module):
    with torch.no_grad():
        for tensor in tensors(module).values():
            tensor.fill_(math.nan if tensor.is_floating_point() else -7)


@pytest.fixture
def poisoned_memory():
    """Fill new memory with NaN, so that unset values show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", MODULES)
def test_constructors_set_every_value_from_the_seed(name):
    torch.manual_seed(3)
    module = MODULES[name]()
    assert all(tensor.isfinite().all() for tensor in tensors(module).values())
    torch.manual_seed(3)
    for key, again in tensors(MODULES[name]()).items():
        assert torch.equal(again, tensors(module)[key]), key


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("part")])
def test_reset_parameters_draws_what_the_constructor_draws(name):
    torch.manual_seed(3)
    wanted = tensors(MODULES[name]())
    following = torch.rand(3)
    module = MODULES[name]()
    poison(module)
    torch.manual_seed(3)
    module.reset_parameters()
    assert torch.equal(torch.rand(3), following)
    for key, tensor in tensors(module).items():
        assert torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize("name", MODULES)
def test_from_the_meta_device(name):
    with torch.device("meta"):
        module = MODULES[name]()
    assert all(tensor.is_meta for tensor in tensors(module).values())
    module.to_empty(device="cpu")
    poison(module)
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    for key, wanted in tensors(MODULES[name]()).items():
        tensor = tensors(module)[key]
        assert tensor.dtype == wanted.dtype
        assert tensor.isfinite().all(), key
        if not name.startswith("part"):  # whose other sublayers have drawn before it
            assert torch.equal(tensor, wanted), key


@pytest.mark.parametrize("remade", [False, True])
def test_routed_experts_leave_a_decoder_the_random_state_of_a_dense_one(remade):
    """Recorded runs start with these numbers; a shared expert draws as a dense layer does."""
    first = []
    for experts in (ExpertsConfig(), MIXTURE, ExpertsConfig(routed=9, width=MIXTURE.width)):
        sizes = {**SIZES, "feed_forward": MIXTURE.width, "experts": experts}
        torch.manual_seed(3)
        model = Decoder(DecoderConfig(**sizes), V4)
        if remade:
            torch.manual_seed(3)
            model.reset_parameters()
        first.append(model.embedding.weight)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


@pytest.mark.usefixtures("poisoned_memory")
def test_initial_experts_have_the_scale_of_a_linear_layer():
    experts = Experts(96, ExpertsConfig(routed=16))
    for weight, inputs in (
        (experts.router.weight, 96),
        (experts.routed.gate_up, 96),
        (experts.routed.down, 64),
    ):
        assert math.isclose(
            weight.std().item(), nn.Linear(inputs, 999).weight.std().item(), rel_tol=0.05
        )
    assert experts(torch.randn(7, 96)).isfinite().all()


@pytest.mark.parametrize("kind", ["hc", "mhc"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["built", "reset"])
def test_a_low_default_dtype_rounds_no_coefficient(kind, default, name):
    """Rounded to bfloat16, the biases of three streams make a pre that sums to 0.9978."""
    config = ConnectionConfig(kind=kind, streams=3, numerics="deepseek_v4")
    wanted = mhc.Stack(8, config, 2)
    torch.set_default_dtype(default)
    try:
        stack, router = mhc.Stack(8, config, 2), Router(8, 4, 2)
        if name == "reset":
            poison(stack)
            stack.reset_parameters()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(stack.parameters(), wanted.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    pre = stack.connections[1].maps(torch.randn(2, 3, 8)).pre
    torch.testing.assert_close(pre.sum(-1), torch.full((2,), 1.0), rtol=0, atol=4e-6)
    assert {tensor.dtype for tensor in tensors(router).values()} == {torch.float32, torch.int64}


def test_reset_in_float64_gives_float64_values():
    stack = mhc.Stack(8, ConnectionConfig(streams=3), 1).double()
    stack.reset_parameters()
    assert stack.connections[0].maps.bias[0].item() == -math.log(2)

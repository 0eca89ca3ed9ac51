import math

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.models import (
    Decoder,
    DecoderConfig,
    Experts,
    ExpertsConfig,
    balance,
    count_parameters,
    mixtures,
)
from manifold_hc.models.experts import grouped_product
from manifold_hc.stack import Stack

C = 8


def mixture(dtype=torch.float64, **sizes):
    experts = Experts(
        C, ExpertsConfig(**{"routed": 5, "active": 2, "shared": 2, "width": 4} | sizes)
    )
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts.to(dtype)


def by_hand(experts, token, bias=None):
    """One token, expert by expert, with plain matrix products; returns output and visits."""
    config = experts.config
    scores = torch.sigmoid(experts.router.weight @ token)
    shifted = scores + (experts.router.bias if bias is None else bias)
    chosen = sorted(range(config.routed), key=lambda e: -shifted[e].item())[: config.active]
    total = sum(scores[e] for e in chosen)
    out = torch.zeros_like(token)
    for e in chosen:
        gate, up = (token @ experts.routed.gate_up[e]).chunk(2)
        out = out + scores[e] / total * ((silu(gate) * up) @ experts.routed.down[e])
    for index in range(config.shared):
        rows = slice(index * config.width, (index + 1) * config.width)
        gate, up = experts.shared.gate_up
        hidden = silu(gate[rows] @ token) * (up[rows] @ token)
        out = out + experts.shared.down.weight[:, rows] @ hidden
    return out, chosen


def test_output_is_the_gated_sum_of_the_experts():
    experts = mixture()
    u = torch.randn(2, 7, C, dtype=torch.float64)
    wanted = torch.stack([by_hand(experts, token)[0] for token in u.flatten(0, 1)])
    torch.testing.assert_close(experts(u), wanted.view_as(u), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_plain_products():
    experts, u = mixture(), torch.randn(9, C, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(9, C, dtype=torch.float64)
    inputs = [u, *experts.parameters()]
    found = torch.autograd.grad((experts(u) * cotangent).sum(), inputs)
    plain = sum((by_hand(experts, t)[0] * c).sum() for t, c in zip(u, cotangent, strict=True))
    for a, b in zip(found, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_bias_moves_the_choice_but_not_the_gates():
    experts = mixture(shared=0)
    token = torch.randn(C, dtype=torch.float64)
    _, before = by_hand(experts, token)
    left_out = next(e for e in range(5) if e not in before)
    experts.router.bias[left_out] = 10.0
    wanted, chosen = by_hand(experts, token)
    assert chosen[0] == left_out
    torch.testing.assert_close(experts(token[None])[0], wanted, rtol=1e-12, atol=1e-12)


def test_no_token_is_dropped_even_if_all_want_the_same_expert():
    experts = mixture(active=1, shared=0)
    experts.router.bias[3] = 10.0
    u = torch.randn(50, C, dtype=torch.float64)
    out = experts(u)
    out.sum().backward()
    assert experts.router.load.tolist() == [0, 0, 0, 50, 0]
    gate, up = (u @ experts.routed.gate_up[3]).chunk(2, -1)
    torch.testing.assert_close(out, (silu(gate) * up) @ experts.routed.down[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_product_is_the_loop(dtype):
    """Sizes that torch supports, with an expert without tokens; outputs and both gradients."""
    sizes = torch.tensor([5, 0, 11, 1])
    rows = torch.randn(17, 16, dtype=dtype, requires_grad=True)
    weights = torch.randn(4, 16, 32, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(17, 32, dtype=dtype)
    found = grouped_product(rows, weights, sizes)
    assert "Grouped" in type(found.grad_fn).__name__
    groups = zip(rows.split(sizes.tolist()), weights, strict=True)
    plain = torch.cat([group @ matrix for group, matrix in groups])
    torch.testing.assert_close(found, plain)
    inputs = [rows, weights]
    for a, b in zip(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(plain, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 7), (torch.float64, 16)])
def test_sizes_that_torch_does_not_support_use_the_loop(dtype, width):
    rows, weights = torch.randn(6, width, dtype=dtype), torch.randn(2, width, 4, dtype=dtype)
    wanted = torch.cat([rows[:2] @ weights[0], rows[2:] @ weights[1]])
    torch.testing.assert_close(grouped_product(rows, weights, torch.tensor([2, 4])), wanted)
    assert grouped_product(rows[:0], weights, torch.tensor([0, 0])).shape == (0, 4)


def test_load_counts_token_expert_pairs_of_training_passes_only():
    experts = mixture(torch.float32)
    u = torch.randn(3, 10, C)
    (experts(u) + experts(u)).sum().backward()
    assert experts.router.load.sum() == 2 * 30 * 2
    with torch.no_grad():
        experts(u)
    experts.eval()(u).sum().backward()
    assert experts.router.load.sum() == 2 * 30 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["grouped", "loop"])
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda experts, u: checkpoint(experts, u, use_reentrant=False), id="new"),
        pytest.param(lambda experts, u: checkpoint(experts, u, use_reentrant=True), id="reentrant"),
        pytest.param(
            lambda experts, u: checkpoint(
                lambda v: checkpoint(experts, v, use_reentrant=False), u, use_reentrant=False
            ),
            id="nested",
        ),
        pytest.param(
            lambda experts, u: Stack(C, ConnectionConfig(), 2, 2)(u, [experts, nn.Identity()]),
            id="stack",
        ),
    ],
)
def test_load_counts_once_under_recompute(run, dtype):
    experts, u = mixture(dtype), torch.randn(3, 10, C, dtype=dtype, requires_grad=True)
    out = run(experts, u)
    out.sum().backward()
    _, chosen = experts.router(u.detach().flatten(0, 1))
    wanted = chosen.flatten().bincount(minlength=5).tolist()
    assert experts.router.load.tolist() == wanted


def test_a_second_backward_through_one_pass_counts_nothing():
    experts = mixture()
    out = experts(torch.randn(30, C, dtype=torch.float64))
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert experts.router.load.sum() == 30 * 2


def test_balancing_moves_the_bias_against_the_load():
    experts = mixture(torch.float32)
    experts.router.load.copy_(torch.tensor([10, 0, 4, 5, 1]))
    assert experts.router.balance(0.25).tolist() == [10, 0, 4, 5, 1]
    assert experts.router.bias.tolist() == [-0.25, 0.25, 0.0, -0.25, 0.25]
    assert experts.router.load.sum() == 0


def test_routing_stays_in_float32():
    """Gates and choice do not depend on the dtype the layers compute in."""
    experts = mixture(torch.float32)
    u = torch.randn(200, C).bfloat16()
    gates, chosen = experts.router(u)
    experts.to(torch.bfloat16)
    assert experts.router.weight.dtype == experts.router.bias.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = experts.router(u)
    assert torch.equal(again[1], chosen)
    assert torch.equal(again[0], gates)
    assert gates.dtype == torch.float32
    assert experts(u).dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [True, False])
def test_a_router_of_a_checkpoint_in_bfloat16_is_widened(assign):
    """Its bias too, which moves by steps that bfloat16 would lose."""
    router = mixture(torch.float32).router
    half = {name: tensor.bfloat16() for name, tensor in router.state_dict().items()}
    router.load_state_dict(half, assign=assign)
    assert router.weight.dtype == router.bias.dtype == torch.float32
    assert torch.equal(router.weight, half["weight"].float())


def test_autocast_computes_in_its_dtype():
    experts = mixture(torch.float32, width=8)
    u = torch.randn(30, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(u)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), experts(u), rtol=0.1, atol=0.2)


def test_the_first_blocks_are_dense():
    config = DecoderConfig(blocks=4, experts=ExpertsConfig(routed=4, dense_blocks=2))
    assert list(mixtures(Decoder(config, ConnectionConfig()))) == [
        "branches.5",
        "branches.7",
    ]
    dense = Decoder(DecoderConfig(blocks=2), ConnectionConfig())
    assert not mixtures(dense)
    assert balance(dense) == []


def test_every_weight_is_initialised():
    config = DecoderConfig(blocks=2, init_std=0.02, experts=ExpertsConfig(routed=8))
    model = Decoder(config, ConnectionConfig())
    for name, parameter in model.branches.named_parameters():
        if parameter.ndim >= 2:
            assert math.isclose(parameter.std().item(), 0.02, rel_tol=0.1), name


def test_active_parameters_exclude_experts_not_chosen():
    """Counted one by one: an embedding, and the matrices of routed - active experts a mixture."""
    config = DecoderConfig(blocks=3, experts=ExpertsConfig(routed=8, active=3, shared=1, width=16))
    model = Decoder(config, ConnectionConfig())
    count = count_parameters(model)
    one_expert = 3 * config.channels * 16
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.vocabulary == 2 * 256 * config.channels
    assert count.active == count.total - 256 * config.channels - 2 * (8 - 3) * one_expert


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExpertsConfig(routed=4, active=5), "active: must be at most routed=4"),
        (lambda: ExpertsConfig(active=0), "active: must be at least 1"),
        (lambda: ExpertsConfig(routed=-1), "routed: must be a number from 0 on"),
        (lambda: ExpertsConfig(balancing=float("nan")), "balancing: must be a number from 0 on"),
        (lambda: ExpertsConfig(balancing="0"), "balancing: must be a number but is '0'"),
        (lambda: Experts(8, ExpertsConfig()), "routed must be at least 1 but is 0, .* use Gated"),
    ],
)
def test_invalid_sizes(build, message):
    with pytest.raises(ConfigError, match=message):
        build()

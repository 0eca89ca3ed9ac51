"""Parts of a stack, the stages of a pipeline: run one after another they equal the whole."""

import pytest
import torch

import manifold_hc as mhc
from manifold_hc.errors import ConfigError, ShapeError

L, C, TOKENS = 6, 8, 5
KINDS = {
    "mhc": mhc.ConnectionConfig(),
    "hc": mhc.ConnectionConfig(kind="hc"),
    "residual": mhc.ConnectionConfig(kind="residual"),
    "single pass": mhc.ConnectionConfig(single_pass=True),
    "deepseek_v4": mhc.ConnectionConfig(numerics="deepseek_v4"),
    "writes to no stream of its own": mhc.ConnectionConfig(disable=("post",)),
}


def network(config, recompute=None):
    stack = mhc.Stack(C, config, L, recompute)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    branches = [torch.nn.Linear(C, C) for _ in range(L)]
    norms = [torch.nn.RMSNorm(C, eps=1e-6) for _ in range(L)]
    return stack, branches, norms


def in_parts(stack, cuts, h, branches, norms):
    """Tensors passed between parts are detached, as between processes."""
    sent, ends = (h,), [*cuts, L]
    met = []
    for first, last in zip([0, *cuts], ends, strict=True):
        here = slice(first, last)
        leaves = tuple(t.detach().requires_grad_() for t in sent)
        source, *pre = leaves
        out = stack.part(range(first, last))(source, branches[here], norms[here], *pre)
        sent = out if isinstance(out, tuple) else (out,)
        met.append((leaves, sent))
    return met


def gradients_through(met, cotangent):
    grads = (cotangent,)
    for leaves, sent in reversed(met):
        grads = torch.autograd.grad(sent, leaves, grads, retain_graph=True)
    return grads[0]


@pytest.mark.parametrize("recompute", [None, 2, "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_consecutive_parts_equal_the_whole_stack(kind, recompute):
    stack, branches, norms = network(KINDS[kind], recompute)
    parameters = [*stack.parameters(), *(p for b in branches for p in b.parameters())]
    h = torch.randn(TOKENS, C, requires_grad=True)
    out = stack(h, branches, norms)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    wanted = [p.grad for p in parameters if p.grad is not None]
    for cuts in ([3], [2, 4], [1, 2, 5]):
        if recompute == 2 and 1 in cuts:
            continue  # a block is longer than that part
        for parameter in parameters:
            parameter.grad = None
        met = in_parts(stack, cuts, h, branches, norms)
        torch.testing.assert_close(met[-1][1][0], out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients_through(met, cotangent), h.grad, rtol=1e-4, atol=1e-5)
        grads = (cotangent,)
        for leaves, sent in reversed(met):
            torch.autograd.backward(sent, grads)
            grads = tuple(leaf.grad for leaf in leaves)
        found = [p.grad for p in parameters if p.grad is not None]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_parts_exchange_streams_and_pre():
    h = torch.randn(2, TOKENS, C)
    for kind, config in KINDS.items():
        stack, branches, norms = network(config)
        _, sent = in_parts(stack, [3], h, branches, norms)[0]
        shapes = [tuple(tensor.shape) for tensor in sent]
        wanted = [(2, TOKENS, config.n, C)]
        assert shapes == (wanted if kind != "single pass" else [*wanted, (2, TOKENS, config.n)])


def test_a_part_keeps_the_names_of_the_whole():
    stack = mhc.Stack(C, mhc.ConnectionConfig(numerics="deepseek_v4"), L)
    names = [set(stack.part(range(*ends)).state_dict()) for ends in ((0, 2), (2, 6))]
    assert names[0] | names[1] == set(stack.state_dict())
    assert not names[0] & names[1]
    assert "connections.5.maps.phi" in names[1]
    assert {name for name in stack.state_dict() if name.startswith("exit")} <= names[1]
    assert stack.part([2]).part([2]).connections[2] is stack.connections[2]


def test_each_part_chooses_its_own_recompute_block_length():
    stack = mhc.Stack(C, mhc.ConnectionConfig(), 60, "auto")
    assert (stack.block_length, stack.part(range(15)).block_length) == (6, 3)
    with pytest.raises(ConfigError, match="a block must have 1 to 3 sublayers"):
        mhc.Stack(C, mhc.ConnectionConfig(), 60, 6).part(range(3))


@pytest.mark.parametrize("sublayers", [[], [6], range(4, 8), [-1], [0, 2], [3, 2], [1, 1, 2]])
def test_sublayers_that_are_not_consecutive_or_present_raise(sublayers):
    with pytest.raises(
        ConfigError, match=r"a part must be consecutive ones of sublayers 0 to 5 but"
    ):
        mhc.Stack(C, mhc.ConnectionConfig(), L).part(sublayers)


def test_a_part_of_single_pass_reads_with_the_given_pre():
    """Stream 0 is read only by the first sublayer of the whole stack."""
    pre = torch.rand(TOKENS, 4)
    for config in (KINDS["single pass"], KINDS["mhc"]):
        stack, branches, _ = network(config)
        part, x = stack.part([2, 3]), torch.randn(TOKENS, 4, C)
        given = None if config.single_pass else pre
        said = "missing" if config.single_pass else "given"
        with pytest.raises(ShapeError, match=f"pre, of the sublayer before, .* but is {said}$"):
            part(x, branches[:2], pre=given)
        with pytest.raises(ShapeError, match=r"but is given$"):
            stack.part([0])(torch.randn(TOKENS, C), branches[:1], pre=pre)


def test_one_branch_for_each_sublayer_of_the_part():
    stack, branches, _ = network(mhc.ConnectionConfig())
    with pytest.raises(ShapeError, match="branches must be 2, one per sublayer, but are 6"):
        stack.part([2, 3])(torch.randn(TOKENS, 4, C), branches)
    with pytest.raises(ShapeError, match=r"x must be \[\.\.\., 4, 8\] but is \[5, 8\]"):
        stack.part([2, 3])(torch.randn(TOKENS, C), branches[:2])


def test_a_part_owns_its_streams_unless_told_otherwise():
    stack, branches, norms = network(KINDS["mhc"])
    h = torch.randn(TOKENS, C)
    own = stack.part(range(2))(h, branches[:2], norms[:2])
    view = stack.part(range(2), owned=False)(h, branches[:2], norms[:2])
    assert not own._is_view()
    assert torch.equal(own, view)
    own.detach_()

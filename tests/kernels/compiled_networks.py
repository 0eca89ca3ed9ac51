"""Networks under torch.compile: `python -m tests.kernels.compiled_networks cpu`."""

import sys

import torch
from torch._dynamo.testing import CompileCounter

import manifold_hc as mhc
from manifold_hc.config import ConnectionConfig
from manifold_hc.models import AttentionConfig, Experts, ExpertsConfig, LatentAttention
from manifold_hc.models.documents import group_documents
from manifold_hc.models.norm import RMSNorm


def network(backend, **options):
    torch.manual_seed(0)
    config = ConnectionConfig(streams=3, phi_std=0.3, backend=backend, **options)
    return mhc.Stack(8, config, sublayers=3)


def outputs_and_gradients(run, stack, h):
    h = h.clone().requires_grad_()
    out = run(h)
    found = torch.autograd.grad(out.sin().sum(), [h, *stack.parameters()], allow_unused=True)
    return [out, *(grad for grad in found if grad is not None)]


def breaking(u):
    """The link between a read and its write then crosses from one graph to the next."""
    torch._dynamo.graph_break()
    return u.sin()


def check(backend, branch=torch.sin, compiler="aot_eager", fullgraph=True, dynamic=None, **options):
    torch._dynamo.reset()
    stack = network(backend, **options)
    compiled = torch.compile(stack, fullgraph=fullgraph, backend=compiler, dynamic=dynamic)
    for tokens in (5, 7, 9):  # from the second on, the number of tokens is symbolic
        h = torch.randn(2, tokens, 8)
        wanted = outputs_and_gradients(lambda h: stack(h, [branch] * 3), stack, h)
        got = outputs_and_gradients(lambda h: compiled(h, [branch] * 3), stack, h)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_replaced(kind):
    """A norm whose forward is replaced after it was compiled runs itself from then on."""
    torch._dynamo.reset()
    stack, h = mhc.Stack(8, ConnectionConfig(), 2), torch.randn(3, 8)
    norms = [kind(8, eps=1e-5) for _ in range(2)]
    run = torch.compile(lambda h: stack(h, [torch.sin] * 2, norms), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(h), stack(h, [torch.sin] * 2, norms))
    norms[1].forward = lambda u: 2 * u
    inside = [lambda u: norms[0](u).sin(), lambda u: (2 * u).sin()]
    torch.testing.assert_close(run(h), stack(h, inside))


def compiled_operators(stack, *arguments):
    """Compare a compiled stack with the eager one, in one graph; return its operators' names."""
    names = []

    def compiler(graph, examples):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    out = torch.compile(stack, backend=compiler, fullgraph=True)(*arguments)
    assert torch.equal(out, stack(*arguments))
    return names


def check_boundaries(backend, fused, norms, **options):
    """A compiled stack fuses the boundaries that an eager one fuses."""
    stack, h = network(backend, **options), torch.randn(2, 5, 8)
    given = [torch.nn.RMSNorm(8, eps=1e-6) for _ in range(3)] if norms else None
    names = compiled_operators(stack, h, [torch.sin] * 3, given)
    assert sum(f"{backend}_boundary" in name for name in names) == fused, names


def check_part(backend):
    """A part without the ends of the stack, whose outputs are streams, is one graph too."""
    part, x = network(backend).part([1]), torch.randn(2, 5, 3, 8)
    compiled_operators(part, x, [torch.sin])


def check_connection_hook(backend):
    """A hook on a connection runs in the graph; the boundaries on both sides are not fused."""
    stack, h = network(backend), torch.randn(2, 5, 8)
    stack.connections[1].register_forward_hook(lambda module, arguments, x: 1.5 * x)
    names = compiled_operators(stack, h, [torch.sin] * 3)
    assert not any(f"{backend}_boundary" in name for name in names), names


def check_experts(dtype):
    """The loop over experts and the count of visits break the graph; torch's product does not."""
    torch._dynamo.reset()
    experts = Experts(8, ExpertsConfig(routed=5, width=8)).to(dtype)
    u = torch.randn(30, 8, dtype=dtype)
    wanted = torch.autograd.grad(experts(u).sum(), experts.routed.down)
    run = torch.compile(experts, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(run(u).sum(), experts.routed.down), wanted)
    assert experts.router.load.sum() == 2 * 30 * 2


def check_documents():
    """However many documents there are, attention is compiled once."""
    torch._dynamo.reset()
    sizes = AttentionConfig(heads=2, head_size=8, rotary_size=4, latent_size=8)
    attention, compiler = LatentAttention(16, sizes, norm_eps=1e-6), CompileCounter()
    run, u, counts = torch.compile(attention, backend=compiler), torch.randn(2, 16, 16), set()
    for lengths in ([16, 16], [1] * 32, [8, 4, 3, 1, 16], [2, 14, 5, 11]):
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        documents = group_documents(numbers.view(2, 16))
        torch.testing.assert_close(run(u, documents), attention(u, documents))
        counts.add(compiler.frame_count)
    assert len(counts) == 1


if __name__ == "__main__":
    backend = sys.argv[1]
    check(backend)
    check(backend, numerics="deepseek_v4", disable=("pre",))
    check(backend, kind="hc")
    check(backend, branch=breaking, fullgraph=False)
    check("auto", dynamic=True)
    check(backend, compiler="inductor")
    for norms in (False, True):
        check_boundaries(backend, 2, norms)
        check_boundaries(backend, 2, norms, single_pass=True)
        check_boundaries(backend, 0, norms, fuse_boundaries=False)
    check_connection_hook(backend)
    check_part(backend)
    check_replaced(torch.nn.RMSNorm)
    check_replaced(RMSNorm)
    check_documents()
    check_experts(torch.float32)
    check_experts(torch.bfloat16)

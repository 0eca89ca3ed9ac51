"""Equations of libraries that cannot be installed here, by the names of their tensors, in float64.

One sublayer each: streams x [tokens, n, C] and a branch -> next streams. `p` is a function from the
last part of a tensor's name to its values.
"""

import importlib.util
from pathlib import Path

import torch


def projected(x, weight, eps, inside=True):
    v = x.flatten(-2)
    square = v.square().mean(-1, keepdim=True)
    return (v @ weight.mT) / ((square + eps).sqrt() if inside else square.sqrt() + eps)


def rows_then_columns(matrix, iterations, eps, first_rows=True):
    for number in range(iterations):
        if number or first_rows:
            matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def megatron(x, p, branch):
    """Megatron-LM main: the matrix mixes as it is, and ends on its columns."""
    n = x.shape[-2]
    m = projected(x, p("mapping_proj.weight"), 1e-6, inside=False)
    gates = torch.cat([p("alpha_pre"), p("alpha_post"), p("alpha_res")])
    h = m * gates.repeat_interleave(torch.tensor([n, n, n * n])) + p("bias")
    pre, post, logits = h.split([n, n, n * n], -1)
    res = rows_then_columns(logits.unflatten(-1, (n, n)).exp(), 20, 0.0)
    y = branch((pre.sigmoid().unsqueeze(-1) * x).sum(-2))
    return torch.einsum("toi,tic->toc", res, x) + 2 * post.sigmoid().unsqueeze(-1) * y.unsqueeze(-2)


def megatron_dev(x, p, branch):
    """Megatron-LM dev: DeepSeek's equations with the epsilon outside the root."""
    gates = torch.cat([p("alpha_pre"), p("alpha_post"), p("alpha_res")])
    m = projected(x, p("mapping_proj.weight"), 1e-6, inside=False)
    return _deepseek(x, m, gates, p("bias"), branch)


def torchtitan(x, p, branch, eps=1e-6):
    """torchtitan: DeepSeek's equations without an epsilon after the softmax."""
    m = projected(x, p("hc_fn"), 1e-6)
    return _deepseek(x, m, p("hc_scale"), p("hc_base"), branch, eps, after_softmax=0.0)


def _deepseek(x, m, gates, base, branch, eps=1e-6, after_softmax=None):
    n = x.shape[-2]
    pre, post, comb = (m * gates.repeat_interleave(torch.tensor([n, n, n * n])) + base).split(
        [n, n, n * n], -1
    )
    comb = comb.unflatten(-1, (n, n)).softmax(-1) + (eps if after_softmax is None else 0.0)
    comb = rows_then_columns(comb, 20, eps, first_rows=after_softmax is not None)
    y = branch(((pre.sigmoid() + eps).unsqueeze(-1) * x).sum(-2))
    write = 2 * post.sigmoid().unsqueeze(-1) * y.unsqueeze(-2)
    return torch.einsum("tso,tsc->toc", comb, x) + write


def tile_kernels_reference():
    """TileKernels' own reference in torch, whose package needs a GPU to be imported; or None."""
    spec = importlib.util.find_spec("tile_kernels")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "torch/mhc.py"
    found = importlib.util.spec_from_file_location("tile_kernels_reference", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module

"""A layer under torch.compile, accelerated and not: `python -m tests.interop.compiled_layers`."""

import warnings

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from manifold_hc.interop import accelerate
from tests.interop import models_with_connections as models


class Attention(nn.Module):
    def forward(self, u, **kwargs):
        return u.tanh(), None


class FeedForward(nn.Module):
    def forward(self, u, input_ids=None):
        return u.sin()


def outputs(run, layer, x):
    out = run(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]


def main():
    layer = models.deepseek_v4().model.layers[0]
    layer.self_attn, layer.mlp = Attention(), FeedForward()
    x = torch.randn(2, 5, 4, 32, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    plain = outputs(compiled, layer, x)
    handle = accelerate(layer)
    # The change of class is noticed: the layer is traced again, whole.
    found, wanted = outputs(compiled, layer, x), outputs(layer, layer, x)
    assert all(map(torch.equal, found, wanted))
    assert not torch.equal(found[0], plain[0])
    handle.remove()
    assert all(map(torch.equal, outputs(compiled, layer, x), plain))
    print(f"compiled {counter.frame_count} graphs")


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        main()

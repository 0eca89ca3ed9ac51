"""Script of test_gain.py: a model has the same figures before and after compilation."""

import copy

import torch
from torch import nn

import manifold_hc as mhc
from manifold_hc.diagnostics import GainMonitor


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        config = mhc.ConnectionConfig(phi_std=0.5, alpha=1.0)
        self.stack = mhc.Stack(8, config, sublayers=3)

    def forward(self, h):
        return self.stack(h, list(self.branches))


def compile_all(modules, model):
    for module in modules:
        module.compile(backend="eager")
    return model


WAYS = {
    "wrapped": lambda model: torch.compile(model, backend="eager"),
    "in-place": lambda model: compile_all([model], model),
    "stack": lambda model: compile_all([model.stack], model),
    "branches": lambda model: compile_all(model.branches, model),
    "maps": lambda model: compile_all([c.maps for c in model.stack.connections], model),
}

torch.manual_seed(0)
plain, h = Network(), torch.randn(2, 5, 8)
wanted, output = GainMonitor(h)(plain), plain(h)
for way, compiled in WAYS.items():
    torch.compiler.reset()
    model = compiled(copy.deepcopy(plain))
    model(h).sum().backward()
    model.eval()
    with torch.no_grad():  # as the monitor does, which could reuse this graph
        model(h)
    assert GainMonitor(h)(model) == wanted, way
    torch.testing.assert_close(model(h), output)
    print(way)

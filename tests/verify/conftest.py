import pytest
import torch

import manifold_hc as mhc


@pytest.fixture
def stack():
    return build()


def build(sublayers=4, channels=8, std=2.0, **config):
    """A stack with random parameters; `std` of the biases, alpha 0.01."""
    config = mhc.ConnectionConfig(**{"streams": 4, "numerics": "deepseek_v4", **config})
    stack = mhc.Stack(channels, config, sublayers)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if not name.endswith("alpha"):
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return stack

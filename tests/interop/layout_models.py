"""Models with random connections, for the tests of the layouts."""

import torch
from torch import nn

import manifold_hc as mhc


def filled(module, std=0.8):
    """The module with normal random values in all parameters, asymmetric in every way."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std)
    return module


def random_stack(layout, n=4, channels=5, sublayers=4, **changes):
    """A Stack with the layout's configuration and random connections."""
    config = mhc.ConnectionConfig(**vars(layout.config(n)) | changes)
    return filled(mhc.Stack(channels, config, sublayers))


def branches(count, channels=5):
    """One linear layer for each sublayer."""
    return [nn.Linear(channels, channels) for _ in range(count)]

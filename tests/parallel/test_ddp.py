"""DistributedDataParallel around a model with connections."""

import os

import torch
import torch.distributed as dist
from torch import nn

from manifold_hc.config import ConnectionConfig
from manifold_hc.models import Decoder, DecoderConfig
from tests.parallel.ranks import run_on_ranks

SIZES = DecoderConfig(vocabulary=17, channels=16, blocks=2, feed_forward=24)
WITHOUT_TRAINABLE = ConnectionConfig(dynamic=False, disable=("pre", "post"))


def step_twice(model):
    """Take two optimizer steps on the local slice of the tokens."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    tokens = torch.randint(0, 17, (4, 8), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(tokens.chunk(size)[rank]).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def decoder():
    torch.manual_seed(0)
    return Decoder(SIZES, WITHOUT_TRAINABLE)


KEPT = []


def data_parallel():
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(decoder())
    step_twice(model)
    # Destroying the model and its process group can deadlock in gloo: the main thread joins a
    # worker that waits for the GIL. The process exits with both alive.
    KEPT.append(model)
    return [parameter.tolist() for parameter in model.module.parameters()]


def test_connections_without_live_parameters_train_under_ddp():
    alone = decoder()
    step_twice(alone)
    for weights in run_on_ranks(2, data_parallel):
        for found, wanted in zip(weights, alone.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(found), wanted.detach())

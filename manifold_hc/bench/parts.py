"""Parts of a training step with the shapes of the full model, each small enough for one machine."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifold_hc import functional
from manifold_hc.bench.peers import adapters
from manifold_hc.bench.peers.implementations import Connected
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task, leaf, quiet
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Connection
from manifold_hc.models import DecoderConfig, Experts, GatedFeedForward, LatentAttention
from manifold_hc.models.norm import RMSNorm

Module = TypeVar("Module", bound=nn.Module)


def block(config: DecoderConfig, experts: bool, device: str) -> nn.ModuleList:
    """Build the branches of a transformer block: attention, and feed-forward or experts."""
    C, eps = config.channels, config.norm_eps
    feed_forward = (
        Experts(C, config.experts) if experts else GatedFeedForward(C, config.feed_forward)
    )
    sublayers = (LatentAttention(C, config.attention, eps), feed_forward)
    branches = nn.ModuleList(nn.Sequential(RMSNorm(C, eps=eps), layer) for layer in sublayers)
    return _initialised(branches, config, device)


def connections(problem: Problem, config: ConnectionConfig) -> list[Connected]:
    """Build our connections of the two sublayers of a transformer block."""
    built = [Connection(problem.channels, config, k).to(problem.device) for k in range(2)]
    return [(connection, tuple(connection.parameters())) for connection in built]


def transformers(problem: Problem) -> list[Connected]:
    """Build the connections of transformers, eager. Raises ImportError where it is missing."""
    inputs = replace(problem, tokens=1).inputs()
    with quiet():
        return [adapters.transformers(problem, inputs) for _ in range(2)]


def block_task(
    branches: nn.ModuleList, connected: Sequence[Connected], streams: int, problem: Problem
) -> Task:
    """Run both sublayers of a transformer block on random streams."""
    x, autocast = leaf(problem.random(streams, problem.channels)), _autocast(problem)

    def forward() -> Sequence[Tensor]:
        new: Tensor = x
        for (connect, _), branch in zip(connected, branches, strict=True):
            new = connect(new, autocast(branch))
        return (new,)

    parameters = [parameter for _, own in connected for parameter in own]
    cotangents = (problem.random(streams, problem.channels),)
    return Task(forward, (x, *branches.parameters(), *parameters), cotangents)


def embedding_task(config: DecoderConfig, problem: Problem) -> Task:
    """Look up the embeddings; the gradient has the size of the whole table."""
    embedding = nn.Embedding(config.vocabulary, config.channels)
    embedding, tokens = _initialised(embedding, config, problem.device), _tokens(config, problem)

    def forward() -> Sequence[Tensor]:
        return (embedding(tokens).to(problem.torch_dtype),)

    return Task(forward, tuple(embedding.parameters()), (problem.random(problem.channels),))


def head_task(config: DecoderConfig, problem: Problem) -> Task:
    """Compute the last norm, the logits, and the loss in float32."""
    norm = RMSNorm(config.channels, eps=config.norm_eps)
    linear = nn.Linear(config.channels, config.vocabulary, bias=False)
    head = _initialised(nn.Sequential(norm, linear), config, problem.device)
    h, targets = leaf(problem.random(problem.channels)), _tokens(config, problem)

    def forward() -> Sequence[Tensor]:
        logits = _autocast(problem)(head)(h)
        return (cross_entropy(logits.flatten(0, 1).float(), targets.flatten()),)

    return Task(forward, (h, *head.parameters()), (torch.ones((), device=problem.device),))


def ends_task(problem: Problem) -> Task:
    """Copy the embedding to the streams, and average them: entry and exit of several streams."""
    h = leaf(problem.random(problem.channels))

    def forward() -> Sequence[Tensor]:
        return (functional.collapse(functional.expand(h, problem.streams)),)

    return Task(forward, (h,), (problem.random(problem.channels),))


def _autocast(problem: Problem) -> torch.autocast:
    """Decorator that runs a branch as training does: products in the streams' dtype."""
    dtype, device = problem.torch_dtype, torch.device(problem.device).type
    narrow = dtype.itemsize < 4
    return torch.autocast(device, dtype=dtype if narrow else None, enabled=narrow)


def _initialised(module: Module, config: DecoderConfig, device: str) -> Module:
    module = module.to(device)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=config.init_std)
    return module


def _tokens(config: DecoderConfig, problem: Problem) -> Tensor:
    return torch.randint(config.vocabulary, (1, problem.tokens), device=problem.device)

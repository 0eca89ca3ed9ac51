"""Parts of a training step with the shapes of the full model, each small enough for one machine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifold_hc import functional
from manifold_hc.bench.peers import adapters
from manifold_hc.bench.peers.implementations import Connect
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task, leaf, quiet
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Branch, Connection
from manifold_hc.models import DecoderConfig, Experts, GatedFeedForward, LatentAttention
from manifold_hc.models.norm import RMSNorm

Module = TypeVar("Module", bound=nn.Module)

Connected = tuple[list[Connect], list[Tensor]]
"""Connections of the two sublayers of a transformer block, and their parameters."""


def block(config: DecoderConfig, experts: bool, device: str) -> nn.ModuleList:
    """Build the branches of a transformer block: attention, and feed-forward or experts."""
    C, eps = config.channels, config.norm_eps
    feed_forward = (
        Experts(C, config.experts) if experts else GatedFeedForward(C, config.feed_forward)
    )
    sublayers = (LatentAttention(C, config.attention, eps), feed_forward)
    branches = nn.ModuleList(nn.Sequential(RMSNorm(C, eps=eps), layer) for layer in sublayers)
    return _initialised(branches, config, device)


def connections(problem: Problem, config: ConnectionConfig) -> Connected:
    """Build our connections of this configuration."""
    built = [
        Connection(problem.channels, config, sublayer).to(problem.device) for sublayer in range(2)
    ]
    return list(built), [p for each in built for p in each.parameters()]


def transformers(problem: Problem) -> Connected:
    """Build the connections of transformers, eager. Raises ImportError where it is missing."""
    inputs = replace(problem, tokens=1).inputs()
    with quiet():
        built = [adapters.transformers(problem, inputs) for _ in range(2)]
    return [connect for connect, _ in built], [p for _, own in built for p in own]


def block_task(
    branches: nn.ModuleList, connected: Connected, streams: int, problem: Problem
) -> Task:
    """Run both sublayers of a transformer block on random streams."""
    connections, parameters = connected
    x = leaf(_random(problem, streams, problem.channels))

    def forward() -> Sequence[Tensor]:
        new: Tensor = x
        for connect, branch in zip(connections, branches, strict=True):
            new = connect(new, _in_precision(branch, problem))
        return (new,)

    leaves = (x, *branches.parameters(), *parameters)
    return Task(forward, leaves, (_random(problem, streams, problem.channels),))


def embedding_task(config: DecoderConfig, problem: Problem) -> Task:
    """Look up the embeddings; the gradient has the size of the whole table."""
    embedding = _initialised(
        nn.Embedding(config.vocabulary, config.channels), config, problem.device
    )
    tokens = _tokens(config, problem)
    return Task(
        lambda: (embedding(tokens).to(problem.torch_dtype),),
        tuple(embedding.parameters()),
        (_random(problem, problem.channels),),
    )


def head_task(config: DecoderConfig, problem: Problem) -> Task:
    """Compute the last norm, the logits, and the loss in float32."""
    norm = RMSNorm(config.channels, eps=config.norm_eps)
    linear = nn.Linear(config.channels, config.vocabulary, bias=False)
    head = _initialised(nn.Sequential(norm, linear), config, problem.device)
    h, targets = leaf(_random(problem, problem.channels)), _tokens(config, problem)

    def forward() -> Sequence[Tensor]:
        logits = _in_precision(head, problem)(h)
        return (cross_entropy(logits.flatten(0, 1).float(), targets.flatten()),)

    return Task(forward, (h, *head.parameters()), (torch.ones((), device=problem.device),))


def ends_task(problem: Problem) -> Task:
    """Copy the embedding to the streams, and average them: entry and exit of several streams."""
    h = leaf(_random(problem, problem.channels))
    return Task(
        lambda: (functional.collapse(functional.expand(h, problem.streams)),),
        (h,),
        (_random(problem, problem.channels),),
    )


def _in_precision(branch: Callable[[Tensor], Tensor], problem: Problem) -> Branch:
    """The branch under autocast, as in training: products in the streams' dtype."""
    narrow = problem.torch_dtype in (torch.bfloat16, torch.float16)
    device = torch.device(problem.device).type

    def forward(u: Tensor) -> Tensor:
        with torch.autocast(device, dtype=problem.torch_dtype if narrow else None, enabled=narrow):
            return branch(u)

    return forward


def _initialised(module: Module, config: DecoderConfig, device: str) -> Module:
    module = module.to(device)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=config.init_std)
    return module


def _random(problem: Problem, *shape: int) -> Tensor:
    return torch.randn(1, problem.tokens, *shape, device=problem.device).to(problem.torch_dtype)


def _tokens(config: DecoderConfig, problem: Problem) -> Tensor:
    return torch.randint(config.vocabulary, (1, problem.tokens), device=problem.device)

"""Size limits of a model, checked before it is built."""

import os

import torch

from manifold_hc import constraints
from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.models import DecoderConfig

MOST_BLOCKS = 4096
"""Largest number of blocks; building more takes minutes, even without weights."""

MOST_WEIGHTS = 2**50
"""Largest number of weights; every tensor's size in bytes then fits into 64 bits."""

STATE_BYTES = 16
"""Bytes per parameter in training: weight, gradient and AdamW's two moments in float32."""


def weights_of(model: DecoderConfig, connection: ConnectionConfig) -> int:
    """Return the number of weights in the matrices of a decoder, without vectors."""
    C, attention, experts = model.channels, model.attention, model.experts
    heads, size, rotary = attention.heads, attention.head_size, attention.rotary_size
    latent = attention.latent_size
    query_and_output = C * heads * (2 * size + rotary)
    key_and_value = C * (latent + rotary) + 2 * latent * heads * size
    mixtures = max(0, model.blocks - experts.dense_blocks) if experts.routed else 0
    expert = 3 * C * experts.width
    mixture = experts.routed * (expert + C) + experts.shared * expert
    branches = model.blocks * (query_and_output + key_and_value)
    branches += (model.blocks - mixtures) * 3 * C * model.feed_forward + mixtures * mixture
    maps = model.sublayers * _projection(C, connection)
    return 2 * model.vocabulary * C + branches + maps


def _projection(channels: int, connection: ConnectionConfig) -> int:
    """Number of weights in the projection `phi` of one sublayer."""
    n = connection.n
    if connection.kind == "residual" or not connection.dynamic:
        return 0
    if connection.kind == "hc":
        return (2 + n) * channels
    return (2 * n + constraints.constraint(connection.mixing, n).size(n)) * n * channels


def require_possible(model: DecoderConfig, connection: ConnectionConfig) -> None:
    """Raise ConfigError for a decoder beyond the limits above."""
    if model.blocks > MOST_BLOCKS:
        raise ConfigError(f"model.blocks: must be at most {MOST_BLOCKS} but is {model.blocks}")
    if (weights := weights_of(model, connection)) > MOST_WEIGHTS:
        raise ConfigError(
            f"model: must have at most {MOST_WEIGHTS:.1e} weights but these sizes make "
            f"{weights:.1e}; make model or connection smaller"
        )


def require_room(
    model: DecoderConfig, connection: ConnectionConfig, device: torch.device, shards: int
) -> None:
    """Raise ConfigError if weights and optimizer state exceed a device's memory.

    shards: number of ranks that shard them. On the CPU all processes that torchrun has started on
    this machine divide its memory.
    """
    memory = _memory(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    needed = weights_of(model, connection) * STATE_BYTES * local // shards
    if memory is not None and needed > memory:
        raise ConfigError(
            f"model: weights, gradients and optimizer state need {needed / 2**30:,.0f} GiB but "
            f"{device.type} has {memory / 2**30:,.0f} GiB; make the model smaller, or share it "
            "among processes with parallel.shard"
        )


def _memory(device: torch.device) -> int | None:
    """Memory of a device in bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

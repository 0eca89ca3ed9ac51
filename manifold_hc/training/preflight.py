"""Checks before a run, so that nothing is written for a run that cannot start."""

import logging
from typing import NamedTuple

import torch

from manifold_hc.data import Batches, Corpus
from manifold_hc.data.tokenizer import require_vocabulary
from manifold_hc.kernels import pick
from manifold_hc.training.config import RunConfig
from manifold_hc.training.device import find_device
from manifold_hc.training.sinks.tensorboard import require_tensorboard
from manifold_hc.training.size import require_room

logger = logging.getLogger("manifold_hc")


class Prepared(NamedTuple):
    """Batches and device of a run that `check` has found able to start."""

    training: Batches
    validation: Batches
    device: torch.device


def check(config: RunConfig, corpus: Corpus) -> Prepared:
    """Check that a run can start on this machine, without writing anything.

    Compiles the CPU kernels on a machine that has none yet: that may take longer than the timeout
    of a distributed run, so it comes before the processes wait for each other.

    Args:
        config: configuration of the run.
        corpus: its text, as `manifold_hc.data.load` returns it.

    Returns:
        Batches for training and validation, and the device.

    Raises:
        DataError: the text is too short, or has ids outside the vocabulary.
        ConfigError: torch does not find the device, or TensorBoard is not installed.
        BackendError: the backend does not support the device.
    """
    require_vocabulary(corpus.tokenizer, corpus.vocabulary, config.model.vocabulary)
    if config.training.tensorboard:
        require_tensorboard()
    data, training = config.data, config.training
    size = (data.sequence, training.batch, training.seed)
    train_batches, validation_batches = (
        Batches(part, *size, mask_documents=data.mask_documents)
        for part in corpus.split(data.sequence, data.validation)
    )
    device = find_device(training.device)
    connection = config.connection
    if connection.kind != "residual":
        pick("read", connection.backend, connection.n, [torch.empty(0, device=device)])
    return Prepared(train_batches, validation_batches, device)


def require_memory(config: RunConfig) -> None:
    """Raise ConfigError if weights and optimizer state exceed the device's memory."""
    parallel = config.parallel
    shards = parallel.pipeline * parallel.shard * parallel.tensor
    device = find_device(config.training.device)
    require_room(config.model, config.connection, device, shards)


def warn_of_warmup(config: RunConfig) -> None:
    """Log a warning if no step of the run trains at the full learning rate."""
    steps, warmup = config.training.steps, config.optimizer.warmup
    if steps <= warmup:
        logger.warning(
            "training.steps=%d is all warm-up: optimizer.warmup=%d; "
            "set it lower for a run that trains at optimizer.lr",
            steps,
            warmup,
        )

"""Start of a run from given weights: checks, loading, and the record of their origin."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.data.equal_tokenizers import have_same_ids
from manifold_hc.data.loading import tokenizer_of
from manifold_hc.data.shards import short
from manifold_hc.data.tokenizer import ByteTokenizer
from manifold_hc.errors import ConfigError, DataError
from manifold_hc.models import Decoder
from manifold_hc.parallel import Processes
from manifold_hc.training.checkpoint_files import require_same_model
from manifold_hc.training.config import RunConfig, differences, leaves
from manifold_hc.training.state import TrainState
from manifold_hc.training.weight_search import find_weights
from manifold_hc.training.weight_source import WeightSource

logger = logging.getLogger("manifold_hc")

CONNECTIONS = "stack."
"""Prefix of the connections' tensors in a decoder's state_dict."""

UNUSED = ("model.init_std", "model.experts.balancing")
"""Keys of the model that the function of given weights does not depend on."""

ADJUSTABLE = (
    "model.norm_eps",
    "model.attention.theta",
    "connection.iterations",
    "connection.norm_eps",
    "connection.hc_eps",
)
"""Keys that may differ although the outputs of given weights depend on them; a warning says so."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a run starts from; optimizer, schedule and data start anew."""

    source: WeightSource
    """The weights on disk."""
    drop_connections: bool = False
    """True to give the connections their initial values, whatever the source has."""

    @property
    def has_connections(self) -> bool:
        """True if the connections' weights are loaded too."""
        return not self.drop_connections and self.source.connection.kind != "residual"

    def require_fit(self, config: RunConfig) -> None:
        """Check that a run can start from the weights, before any text is read.

        Raises:
            ConfigError: a size of the model differs, or connections that are to be loaded do.
            DataError: the text has another tokenizer, or that of the weights is neither known nor
                given.
            CheckpointError: tensors are missing, unknown or of another shape.
        """
        self._require_same_sizes(config)
        if self.has_connections:
            self._require_same_connections(config.connection)
        self._warn_of_adjusted(config)
        self._require_same_tokenizer(config.data)
        with torch.device("meta"):
            model = Decoder(config.model, config.connection)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        require_same_model(self.source.path, self._loaded(self.source.shapes), self._loaded(wanted))

    def load(self, state: TrainState) -> None:
        """Load the weights into a new state; a collective call."""
        model = get_model_state_dict(state.model)
        tensors = self._loaded(model)
        self.source.read(tensors, state.processes)
        set_model_state_dict(
            state.model, model_state_dict=tensors, options=StateDictOptions(strict=False)
        )
        logger.info("starting from the weights of %s", self.source.path)

    def verify(self, processes: Processes) -> None:
        """Raise CheckpointError if a file of the weights is damaged; a collective call."""
        self.source.verify(processes)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """Path, step and digest of the weights, for the record of the run; reads the files."""
        return {
            "path": str(self.source.path.resolve()),
            "step": self.source.step,
            "sha256": self.source.sha256(),
            "connections": "loaded" if self.has_connections else "new",
        }

    def _loaded(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The entries of `tensors` that are loaded, by name."""
        if self.has_connections:
            return tensors
        return {name: value for name, value in tensors.items() if not name.startswith(CONNECTIONS)}

    def _require_same_sizes(self, config: RunConfig) -> None:
        wanted, found = dict(leaves(config.model)), dict(leaves(self.source.model))
        for name in differences(config.model, self.source.model):
            if f"model.{name}" not in (*UNUSED, *ADJUSTABLE):
                raise ConfigError(
                    f"model.{name}: is {wanted[name]} but the weights of {self.source.path} have "
                    f"{found[name]}; leave it out, or start from other weights"
                )

    def _require_same_connections(self, connection: ConnectionConfig) -> None:
        wanted, found = _structure(connection), _structure(self.source.connection)
        for name, value in found.items():
            if wanted.get(name) != value:
                raise ConfigError(
                    f"connection.{name}: is {_shown(wanted.get(name))} but the weights of "
                    f"{self.source.path} have {_shown(value)}; leave it out, or start with new "
                    "connections: drop_connections=True in Python, --drop-connections in mhc"
                )

    def _warn_of_adjusted(self, config: RunConfig) -> None:
        differing = differences(config.model, self.source.model, "model.")
        if self.has_connections:
            differing += differences(config.connection, self.source.connection, "connection.")
        for key in differing:
            if key in ADJUSTABLE:
                logger.warning(
                    "%s differs from that of the initial weights: the outputs before the first "
                    "step do too",
                    key,
                )

    def _require_same_tokenizer(self, data: DataConfig) -> None:
        known, chosen = self.source.tokenizer, tokenizer_of(data)
        if known is None:
            if not (data.tokenizer or chosen.source):
                self._require_bytes()
            logger.warning(
                "init: the tokenizer of %s is not known, only the size of its vocabulary is "
                "checked",
                self.source.path,
            )
        elif not have_same_ids(known, chosen):
            raise DataError(
                f"init: the weights of {self.source.path} have another tokenizer "
                f"({short(known.fingerprint)}) than the text, {chosen.name} "
                f"({short(chosen.fingerprint)}); give data.tokenizer={known.name} with texts, or "
                "shards made with it"
            )

    def _require_bytes(self) -> None:
        """Raise DataError unless weights without a tokenizer can be those of bytes."""
        vocabulary = self.source.model.vocabulary
        if self.source.unreadable or vocabulary != ByteTokenizer.vocabulary:
            reason = self.source.unreadable or f"no tokenizer.json, model.vocabulary={vocabulary}"
            raise DataError(
                f"init: the tokenizer of {self.source.path} is not known ({reason}); give "
                "data.tokenizer=FILE, or data.tokenizer=bytes for weights that were made with bytes"
            )


def initial_config(path: str | Path, step: int | None = None) -> RunConfig:
    """Return the default configuration of a run that starts from given weights.

    Args:
        path: run folder, checkpoint or exported model, as for `init` of `training.run`.
        step: of a checkpoint in a run folder; the newest if left out.

    Returns:
        Model, connection and tokenizer of the weights; everything else has its default.

    Raises:
        ConfigError: the folder holds no weights.
        CheckpointError: the checkpoint is missing or damaged.
        RunFolderError: a configuration is damaged or of another version.

    Example:
        >>> from manifold_hc import training
        >>> steps = training.TrainingConfig(steps=2, batch=2, validation_batches=1)
        >>> config = training.RunConfig(training=steps)
        >>> summary = training.run(config, "runs/base")
        >>> training.initial_config("runs/base").model == config.model
        True
    """
    return find_weights(path, step).config()


def _structure(connection: ConnectionConfig) -> dict[str, object]:
    """The keys that decide the meaning of a connection's weights, most important first."""
    keys: dict[str, object] = {
        "kind": connection.kind,
        "streams": connection.n,
        "dynamic": connection.dynamic,
        "disable": tuple(sorted(connection.disable)),
        "exit": connection.exit_rule,
    }
    if connection.kind == "mhc":
        keys["constraint"] = connection.mixing
        keys["numerics"] = connection.numerics
        keys["single_pass"] = connection.is_single_pass
    return keys


def _shown(value: object) -> str:
    return ",".join(value) or "none" if isinstance(value, tuple) else str(value)

"""torchtitan's trainer with the connections on its command line."""

from dataclasses import dataclass, field
from typing import Any

from torchtitan.trainer import Trainer

from manifold_hc.config import ConnectionConfig
from manifold_hc.interop.torchtitan.checks import require_supported
from manifold_hc.interop.torchtitan.spec import with_connections


class ConnectedTrainer(Trainer):
    """torchtitan's trainer; `--connection.kind hc` and the like choose the connections."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """torchtitan's configuration of a run, and that of the connections."""

        connection: ConnectionConfig = field(default_factory=ConnectionConfig)
        """Connections around attention and feed-forward of every block."""

        def __post_init__(self) -> None:
            """Put the connections into the model; raise ConfigError for unsupported settings."""
            Trainer.Config.__post_init__(self)
            require_supported(self.connection, self.parallelism)
            _connect(self)


def _connect(config: Any) -> None:
    """Put the connections of a trainer's configuration into its model, if it has one."""
    if config.model_spec is not None:
        config.model_spec = with_connections(config.model_spec, config.connection)

"""Connections for a DeepSeek-V3 model of torchtitan."""

from dataclasses import fields, replace
from typing import Any

from torchtitan.models.deepseek_v3.model import DeepSeekV3Model, DeepSeekV3TransformerBlock
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from manifold_hc.config import ConnectionConfig, require_config
from manifold_hc.errors import ConfigError
from manifold_hc.interop.torchtitan.model import ConnectedBlock, ConnectedModel, Streams
from manifold_hc.interop.torchtitan.parallelize import parallelize


def with_connections(spec: ModelSpec, connection: ConnectionConfig | None = None) -> ModelSpec:
    """Return a DeepSeek-V3 model specification of torchtitan with connections.

    The network computes the same function at step 0 (arXiv 2512.24880, section 4). A specification
    that has connections already gets others. Blocks of multi-token prediction stay residual: they
    read the hidden state after the last block.

    Args:
        spec: From `torchtitan.models.deepseek_v3.model_registry`, or from this function.
        connection: Kind and sizes of the connections; None for the paper's mHC with four streams.

    Returns:
        A new specification; `spec` is unchanged. Only a residual one reads and writes Hugging Face
        checkpoints, a format that has no place for connections.

    Raises:
        ConfigError: If the model is not torchtitan's DeepSeek-V3.

    Example:
        >>> import manifold_hc as mhc
        >>> from manifold_hc.interop.torchtitan import with_connections
        >>> from torchtitan.models.deepseek_v3 import model_registry
        >>> spec = with_connections(model_registry("debugmodel"), mhc.ConnectionConfig(streams=2))
        >>> [layer.streams.connection.streams for layer in spec.model.layers]
        [2, 2, 2, 2, 2, 2]
    """
    connection = require_config("with_connections", connection)
    model = spec.model
    if not isinstance(model, DeepSeekV3Model.Config) or not all(
        isinstance(layer, DeepSeekV3TransformerBlock.Config) for layer in model.layers
    ):
        raise ConfigError(
            "with_connections: the model must be torchtitan's DeepSeek-V3 but is "
            f"{type(model).__qualname__} of {spec.name}; take one of "
            "torchtitan.models.deepseek_v3.model_registry"
        )
    layers = [
        _connect(layer, _streams(model, connection, block))
        for block, layer in enumerate(model.layers)
    ]
    return replace(
        spec,
        model=ConnectedModel.Config(**_values(model) | {"layers": layers}),
        parallelize_fn=parallelize,
        state_dict_adapter=DeepSeekV3StateDictAdapter if connection.kind == "residual" else None,
    )


def _streams(
    model: DeepSeekV3Model.Config, connection: ConnectionConfig, block: int
) -> Streams.Config:
    return Streams.Config(
        dim=model.dim, connection=connection, block=block, blocks=len(model.layers)
    )


def _connect(
    layer: DeepSeekV3TransformerBlock.Config, streams: Streams.Config
) -> ConnectedBlock.Config:
    return ConnectedBlock.Config(**_values(layer) | {"streams": streams})


def _values(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration, not copied."""
    return {field.name: getattr(config, field.name) for field in fields(config)}

"""Configuration of our models in transformers: the sections of a run, and transformers' names."""

from dataclasses import asdict, replace
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.interop.sections import build_section
from manifold_hc.interop.trained import MODEL_TYPE
from manifold_hc.models import DecoderConfig

CODE = "modeling_manifold_hc"
"""Module in the folder of a saved model that imports these classes, for trust_remote_code."""

OTHERS = {
    "model_type",
    "auto_map",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "torch_dtype",
    "num_labels",
    "output_attentions",
    "attn_implementation",
    "experts_implementation",
    "_attn_implementation_autoset",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
"""Keys that transformers itself passes to a configuration."""


class ManifoldConfig(PretrainedConfig):
    """Configuration of a `ManifoldForCausalLM`: the sections `model` and `connection` of a run.

    Args:
        model: sizes of the decoder, a `DecoderConfig` or a mapping of its fields.
        connection: connections, a `ConnectionConfig` or a mapping of its fields.
        use_cache: True to return the cache of a forward pass.

    Raises:
        ConfigError: for a key that is unknown here and to transformers, and for invalid values.

    Example:
        >>> from manifold_hc.interop.huggingface import ManifoldConfig
        >>> config = ManifoldConfig(model={"channels": 32, "blocks": 2})
        >>> config.hidden_size, config.num_hidden_layers, config.connection["kind"]
        (32, 2, 'mhc')
    """

    model_type = MODEL_TYPE

    model: Any = None
    connection: Any = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **others: Any) -> None:
        """Check the sections and complete them with defaults."""
        known = OTHERS | GenerationConfig._get_default_generation_params().keys()
        if unknown := sorted(key for key in others if key not in known):
            raise ConfigError(
                f"ManifoldConfig: {unknown[0]} is no key; sizes belong to model or connection"
            )
        self.model = asdict(build_section(DecoderConfig, self.model or {}, "model"))
        self.connection = asdict(
            build_section(ConnectionConfig, self.connection or {}, "connection")
        )
        if self.tie_word_embeddings:
            raise ConfigError(
                "tie_word_embeddings: must be False; embedding and head are two matrices"
            )
        self.auto_map = {
            "AutoConfig": f"{CODE}.ManifoldConfig",
            "AutoModelForCausalLM": f"{CODE}.ManifoldForCausalLM",
        }
        others.pop("auto_map", None)
        super().__post_init__(**others)

    @property
    def decoder_config(self) -> DecoderConfig:
        """Sizes of the decoder."""
        return build_section(DecoderConfig, self.model, "model")

    @property
    def connection_config(self) -> ConnectionConfig:
        """Kind and sizes of the connections."""
        return build_section(ConnectionConfig, self.connection, "connection")

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V."""
        return self.decoder_config.vocabulary

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model = asdict(replace(self.decoder_config, vocabulary=size))

    @property
    def hidden_size(self) -> int:
        """Channels C."""
        return self.decoder_config.channels

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks, each with one entry in a cache."""
        return self.decoder_config.blocks

    @property
    def num_attention_heads(self) -> int:
        """Number of attention heads."""
        return self.decoder_config.attention.heads

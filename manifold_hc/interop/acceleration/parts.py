"""Table of the classes of transformers that `accelerate` knows, each with its replacement."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from manifold_hc.interop.acceleration import forwards, sublayers

TESTED = ("5.23.0", "5.24.0")
"""Versions of transformers that the tests ran with."""

STREAMS = ("hidden_streams",)

LAYER = frozenset(
    ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "attn_hc", "ffn_hc")
)
"""Submodules of a layer."""

INDEXED = (
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "position_embeddings",
    "prev_topk_indices",
    "kwargs",
)
"""Arguments of a layer that passes the indices of its attention on."""

CACHED = tuple("cache" if name == "past_key_values" else name for name in INDEXED)
"""The same in transformers 5.24."""


@dataclass(frozen=True)
class Part:
    """One class of transformers, and the forward that replaces its own."""

    model_type: str
    """Name of the model in transformers."""
    name: str
    """Name of the class, in the model's `modeling_*` file."""
    forward: Callable[..., Any]
    arguments: tuple[str, ...]
    """Arguments of both forwards, without self."""
    children: frozenset[str] = frozenset()
    """Names of the submodules."""
    maps: Callable[[Any], sublayers.Maps] | None = None
    """Map parameters of a connection or head; None for a layer."""

    @property
    def is_layer(self) -> bool:
        """True for a decoder layer, which holds two connections."""
        return self.children == LAYER

    def is_class(self, kind: type) -> bool:
        """True if this is the class itself, which is imported if a model has it."""
        path = f"transformers.models.{self.model_type}.modeling_{self.model_type}"
        return getattr(sys.modules.get(path), self.name, None) is kind


def attention_result(layer: nn.Module, y: Tensor) -> Any:
    """Return the attention's output y in the form that its layer takes it from `self_attn`."""
    part = part_of(type(layer))
    if part is not None and part.forward is forwards.deepseek_v4_layer:
        return y, None
    return y if getattr(layer, "block_type", None) == "linear_attention" else (y, None, None)


NORM = frozenset(("input_norm",))

PARTS = (
    Part(
        "deepseek_v4",
        "DeepseekV4DecoderLayer",
        forwards.deepseek_v4_layer,
        ("hidden_states", "input_ids", "kwargs"),
        LAYER,
    ),
    Part(
        "deepseek_v4",
        "DeepseekV4HyperConnection",
        forwards.mhc_connection,
        STREAMS,
        NORM,
        sublayers.mhc_maps,
    ),
    Part(
        "deepseek_v4",
        "DeepseekV4HyperHead",
        forwards.learned_head,
        ("x",),
        NORM,
        sublayers.head_maps,
    ),
    # GLM-5.3's exit is the plain mean of the streams, which keeps transformers' own code.
    Part("glm5_next", "Glm5NextTextDecoderLayer", forwards.indexed_layer, INDEXED, LAYER),
    Part("glm5_next", "Glm5NextTextDecoderLayer", forwards.cached_layer, CACHED, LAYER),
    Part(
        "glm5_next",
        "Glm5NextTextHyperConnection",
        forwards.mhc_connection,
        STREAMS,
        NORM,
        sublayers.mhc_maps,
    ),
    Part("hy_v4", "HYV4DecoderLayer", forwards.indexed_layer, INDEXED, LAYER),
    Part("hy_v4", "HYV4DecoderLayer", forwards.cached_layer, CACHED, LAYER),
    Part(
        "hy_v4",
        "HYV4HyperConnection",
        forwards.identity_connection,
        STREAMS,
        NORM,
        sublayers.identity_maps,
    ),
    Part("hy_v4", "HYV4HyperHead", forwards.learned_head, ("x",), NORM, sublayers.head_maps),
)
"""Every class that is replaced."""

MODEL_TYPES = tuple(dict.fromkeys(part.model_type for part in PARTS))
"""Models that `accelerate` knows."""

REFUSED = {"qwen4_exp": "its residual streams have low-rank gates and no mixing matrix"}
"""Models with several residual streams whose equations are others, with the difference."""


def part_of(kind: type) -> Part | None:
    """Return the part that a class is or derives from; None for any other class.

    Of two versions of a class, the part whose forward has the arguments of the installed one.
    """
    for base in kind.__mro__:
        parts = [part for part in PARTS if base.__name__ == part.name and part.is_class(base)]
        if parts:
            arguments = arguments_of(base)
            return next((part for part in parts if part.arguments == arguments), parts[0])
    return None


def arguments_of(kind: type) -> tuple[str, ...]:
    """Return the arguments of a class's forward, without self."""
    return tuple(inspect.signature(original_forward(kind)).parameters)[1:]


def original_forward(kind: type) -> Callable[..., Any]:
    """Return the forward of a class, without the checkpointing that transformers puts around."""
    return inspect.unwrap(cast(type[nn.Module], kind).forward)

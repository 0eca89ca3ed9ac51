"""Families of models of transformers whose blocks are described: one small entry each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manifold_hc.errors import ConfigError
from manifold_hc.interop.retrofit.sublayers import Parallel, Sublayer, SublayerFunction


@dataclass(frozen=True)
class Family:
    """Models of transformers whose blocks have the same residual branches.

    Attributes:
        sublayers: Branches of one block in the order of the forward pass; or a function that
            returns them for the model's configuration.
        layers: Path of the list of blocks in the base model (`model.base_model`).
        refused: Names of options of the model's configuration that change the blocks, and must be
            off.
    """

    sublayers: tuple[SublayerFunction, ...] | Callable[[Any], tuple[SublayerFunction, ...]]
    layers: str = "layers"
    refused: tuple[str, ...] = ()


def _attention(*modules: str, scale: str | None = None) -> Sublayer:
    return Sublayer(modules, "self_attn", scale)


def _gpt_neox(config: Any) -> tuple[SublayerFunction, ...]:
    attention = Sublayer(
        ("input_layernorm", "attention", "post_attention_dropout"), arguments_to="attention"
    )
    feed_forward = Sublayer(("post_attention_layernorm", "mlp", "post_mlp_dropout"))
    if config.use_parallel_residual:
        return (Parallel((attention, feed_forward)),)
    return (attention, feed_forward)


def _stablelm(config: Any) -> tuple[SublayerFunction, ...]:
    attention = _attention("input_layernorm", "self_attn")
    if config.use_parallel_residual:
        return (Parallel((attention, Sublayer(("input_layernorm", "mlp", "dropout")))),)
    return (attention, Sublayer(("post_attention_layernorm", "mlp", "dropout")))


PRE_NORM = Family(
    (
        _attention("input_layernorm", "self_attn"),
        Sublayer(("post_attention_layernorm", "mlp")),
    )
)
POST_NORM = Family(
    (
        _attention("self_attn", "post_attention_layernorm"),
        Sublayer(("mlp", "post_feedforward_layernorm")),
    )
)
PRE_AND_POST_NORM = Family(
    (
        _attention("input_layernorm", "self_attn", "post_attention_layernorm"),
        Sublayer(("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")),
    )
)
SCALED = Family(
    (
        _attention("input_layernorm", "self_attn", scale="residual_multiplier"),
        Sublayer(("post_attention_layernorm", "mlp"), scale="residual_multiplier"),
    )
)
SHARED_NORM = Family(
    (Parallel((_attention("input_layernorm", "self_attn"), Sublayer(("input_layernorm", "mlp")))),)
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "mixtral", "smollm3", "helium"), PRE_NORM),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss"), PRE_NORM),
    **dict.fromkeys(("gemma", "olmo", "olmoe", "glm", "starcoder2", "nemotron"), PRE_NORM),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), POST_NORM),
    **dict.fromkeys(("gemma2", "gemma3_text"), PRE_AND_POST_NORM),
    "granite": SCALED,
    **dict.fromkeys(("cohere", "cohere2"), SHARED_NORM),
    "glm4": Family(
        (
            _attention("input_layernorm", "self_attn", "post_self_attn_layernorm"),
            Sublayer(("post_attention_layernorm", "mlp", "post_mlp_layernorm")),
        )
    ),
    "apertus": Family(
        (
            _attention("attention_layernorm", "self_attn"),
            Sublayer(("feedforward_layernorm", "mlp")),
        )
    ),
    "phi3": Family(
        (
            _attention("input_layernorm", "self_attn", "resid_attn_dropout"),
            Sublayer(("post_attention_layernorm", "mlp", "resid_mlp_dropout")),
        )
    ),
    "phi": Family(
        (
            Parallel(
                (
                    _attention("input_layernorm", "self_attn", "resid_dropout"),
                    Sublayer(("input_layernorm", "mlp", "resid_dropout")),
                )
            ),
        )
    ),
    "gpt2": Family(
        (Sublayer(("ln_1", "attn"), arguments_to="attn"), Sublayer(("ln_2", "mlp"))),
        layers="h",
        refused=("add_cross_attention",),
    ),
    "gpt_neox": Family(_gpt_neox),
    "stablelm": Family(_stablelm),
}
"""Known families by the `model_type` of their configuration; a new entry is used at once."""


def family_of(config: Any) -> tuple[Family, tuple[SublayerFunction, ...]]:
    """Return the family of a transformers configuration, and the branches of its blocks.

    Raises:
        ConfigError: For an unknown model_type, or an option that the family refuses.
    """
    model_type = config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"convert: the family must be one of {', '.join(sorted(FAMILIES))} but the model's "
            f"model_type is {model_type!r}; describe its blocks with "
            f"retrofit.FAMILIES[{model_type!r}] = retrofit.Family(...), see docs/retrofit.md"
        )
    for option in family.refused:
        if getattr(config, option, False):
            raise ConfigError(
                f"convert: {option} must be off for {model_type} but is "
                f"{getattr(config, option)!r}; its sublayer is not described in retrofit.FAMILIES"
            )
    sublayers = family.sublayers
    return family, sublayers if isinstance(sublayers, tuple) else sublayers(config)

"""The layouts: names, order, direction and epsilons of every library, in one table."""

from dataclasses import replace

from manifold_hc.errors import ConfigError
from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.names import Field, Names
from manifold_hc.interop.layouts.native import Parameter

ROWS_LAST = "columns of res first, rows last"
COLUMNS_LAST = "rows of res first, columns last"
OUTPUT_FIRST = "res[output, input]"
SOURCE_FIRST = "comb[source, target], the transpose of res"

OWN = (Field("phi", "phi"), Field("alpha", "alpha"), Field("bias", "bias"))

SCALES: tuple[tuple[str, int], ...] = (("alpha_pre", 0), ("alpha_post", 1), ("alpha_res", 2))
"""Names of three scalars in place of alpha, each with its entry."""


def _packed(first: str = "") -> tuple[Field, ...]:
    """Return the tensors fn, base and scale, in the shapes of phi, bias and alpha."""
    names: tuple[tuple[str, Parameter], ...] = (("fn", "phi"), ("base", "bias"), ("scale", "alpha"))
    return tuple(Field(first + name, parameter) for name, parameter in names)


def _scalars(shape: tuple[int, ...]) -> tuple[Field, ...]:
    """Return the three scalars, each of the given shape."""
    return tuple(Field(name, "alpha", entry=entry, entry_shape=shape) for name, entry in SCALES)


MANIFOLD = Layout(
    name="manifold",
    source="this package: `Stack.state_dict()`, run folders, converted models and adapters",
    family="manifold",
    names=Names(
        sublayers=("connections.{layer}.maps.{field}",),
        fields=OWN,
        exit="exit.{field}",
        exit_fields=OWN,
        # A converted model has layers.0.hc_stack.connections.1, with the number of the sublayer
        # among all.
        module="hc_stack",
        marker=r"(^|\.)connections\.|\.maps\.",
    ),
    order=ROWS_LAST,
    direction=f"{OUTPUT_FIRST}; with deepseek_v4 numerics comb[source, target]",
    norm_eps=1e-20,
    norm_eps_place="inside the root",
    hc_eps=0.0,
    post_factor=2.0,
    iterations=20,
    exit=None,
    exits=("mean", "sum", "learned", "pre"),
    numerics="paper",
    constraint="sinkhorn",
)

DEEPSEEK_V4 = Layout(
    name="deepseek_v4",
    source="DeepSeek-V4 and V4.1, files as released",
    family="deepseek_v4",
    names=Names(
        sublayers=("layers.{layer}.hc_attn_{field}", "layers.{layer}.hc_ffn_{field}"),
        fields=_packed(),
        exit="hc_head_{field}",
        exit_fields=_packed(),
        # transformers saves a causal model as model.layers.N.hc_attn_fn and model.hc_head.hc_fn.
        aliases=(("hc_head.hc_", "hc_head_"),),
        marker=r"(^|\.)hc_",
    ),
    order=ROWS_LAST,
    direction=SOURCE_FIRST,
    norm_eps=1e-6,
    norm_eps_place="inside the root",
    hc_eps=1e-6,
    post_factor=2.0,
    iterations=20,
    exit="learned",
    exits=("learned", "pre", "mean"),
    numerics="deepseek_v4",
    constraint="sinkhorn",
)

TRANSFORMERS = replace(
    DEEPSEEK_V4,
    name="transformers",
    source="transformers 5.23.0: deepseek_v4 and glm5_next, names of modules",
    names=Names(
        sublayers=("layers.{layer}.attn_hc.{field}", "layers.{layer}.ffn_hc.{field}"),
        fields=_packed(),
        exit="hc_head.{field}",
        exit_fields=_packed("hc_"),
        prefix="model.",
        marker=r"_hc\.|(^|\.)hc_",
    ),
)

TILE_KERNELS = replace(
    DEEPSEEK_V4,
    name="tile_kernels",
    source="tile-kernels 1.0.0: arguments of `mhc_pre` and `mhc_head`",
    family="tile_kernels",
    names=Names(
        sublayers=("sublayers.{layer}.{field}",),
        fields=_packed(),
        exit="head.{field}",
        exit_fields=_packed(),
        fold="norm_weight",
        marker=r"(^|\.)sublayers\.|(^|\.)head\.",
    ),
    iterations=10,
    post_factor=1.0,
    difference="post is a sigmoid times 1 by default: call with post_mult_value=2.0",
)

LIGER = replace(
    DEEPSEEK_V4,
    name="liger",
    source="liger-kernel 0.8.5: `LigerMHC`, in a list of one per sublayer",
    family="liger",
    names=Names(
        sublayers=("{layer}.{field}",),
        fields=(Field("phi", "phi", transposed=True), Field("b", "bias"), *_scalars(())),
        swaps_res=True,
        marker=r"(^|\.)(phi|alpha_pre|alpha_post|alpha_res)$",
    ),
    order=COLUMNS_LAST,
    direction=OUTPUT_FIRST,
    exit=None,
    exits=("mean", "sum"),
    constraint="sinkhorn_columns",
    difference="pre lacks the epsilon 1e-6 by default: construct with pre_eps=1e-6",
)

MEGATRON = Layout(
    name="megatron",
    source="Megatron-LM main d98e8a6 (0.20): `HyperConnectionModule`",
    family="megatron",
    names=Names(
        sublayers=(
            "layers.{layer}.self_attention_hyper_connection.{field}",
            "layers.{layer}.mlp_hyper_connection.{field}",
        ),
        fields=(Field("mapping_proj.weight", "phi"), Field("bias", "bias"), *_scalars((1,))),
        prefix="decoder.",
        marker=r"hyper_connection\.|(^|\.)hc_head",
    ),
    order=COLUMNS_LAST,
    direction=OUTPUT_FIRST,
    norm_eps=1e-6,
    norm_eps_place="outside the root",
    hc_eps=0.0,
    post_factor=2.0,
    iterations=20,
    exit="mean",
    exits=("mean",),
    numerics="paper",
    constraint="sinkhorn_columns",
    fixed=("norm_eps", "hc_eps"),
    difference="the norm divides by rms + 1e-6, which is 1e-6 of the logits for streams of rms 1",
)

MEGATRON_DEV = replace(
    MEGATRON,
    name="megatron_dev",
    source="Megatron-LM dev d48bd6b (0.19): `HyperConnectionModule`",
    names=replace(MEGATRON.names, exit="hc_head_{field}", exit_fields=_packed()),
    order=ROWS_LAST,
    direction=SOURCE_FIRST,
    hc_eps=1e-6,
    exit="learned",
    exits=("learned",),
    numerics="deepseek_v4",
    constraint="sinkhorn",
    difference=f"{MEGATRON.difference}; the exit adds layernorm_epsilon inside the root and to pre",
)

TORCHTITAN = replace(
    DEEPSEEK_V4,
    name="torchtitan",
    source="torchtitan 19ef0f5: deepseek_v4",
    family="torchtitan",
    names=Names(
        sublayers=(
            "layers.{layer}.hc_attn_pre.{field}",
            "layers.{layer}.hc_ffn_pre.{field}",
        ),
        fields=_packed("hc_"),
        exit="hc_head.{field}",
        exit_fields=_packed("hc_"),
        marker=r"(^|\.)hc_",
    ),
    exits=("learned",),
    difference="no epsilon follows the softmax of the rows of comb: 0.09 of an entry of res at "
    "large logits, nothing at eps=0",
)

LAYOUTS: dict[str, Layout] = {
    one.name: one
    for one in (
        MANIFOLD,
        DEEPSEEK_V4,
        TRANSFORMERS,
        TILE_KERNELS,
        LIGER,
        MEGATRON,
        MEGATRON_DEV,
        TORCHTITAN,
    )
}
"""Layouts by name."""


def layout(name: str) -> Layout:
    """Return the layout `name`; raise ConfigError if there is none."""
    if name not in LAYOUTS:
        raise ConfigError(f"layout: must be one of {', '.join(LAYOUTS)} but is {name!r}")
    return LAYOUTS[name]

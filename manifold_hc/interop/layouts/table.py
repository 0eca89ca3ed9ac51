"""The layouts: names, order, direction and epsilons of every library, in one table."""

from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.names import Field, Names

ROWS = "pre | post | res"
"""Order of the rows of phi and bias, the same everywhere."""

DEEPSEEK = {
    "order": f"{ROWS}; softmax of rows of comb, then columns, rows, ..., columns last",
    "direction": "comb[source, target]; res is its transpose",
    "norm_eps": 1e-6,
    "norm_eps_place": "inside the root",
    "hc_eps": 1e-6,
    "post_factor": 2.0,
    "numerics": "deepseek_v4",
}
"""Conventions that DeepSeek's code and its followers share."""


def _packed(prefix: str = "") -> tuple[Field, Field, Field]:
    """Return the three tensors fn, base and scale, in the shapes of phi, bias and alpha."""
    names = {"fn": "phi", "base": "bias", "scale": "alpha"}
    return tuple(Field(prefix + name, parameter) for name, parameter in names.items())


def _scales(shape: tuple[int, ...]) -> tuple[Field, Field, Field]:
    """Return the three scalars that hold the entries of alpha."""
    names = ("alpha_pre", "alpha_post", "alpha_res")
    return tuple(
        Field(name, "alpha", entry=entry, entry_shape=shape) for entry, name in enumerate(names)
    )


OWN = tuple(Field(name, name) for name in ("phi", "alpha", "bias"))

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="manifold",
            source="manifold-hc, Stack.state_dict()",
            family="manifold",
            names=Names(
                sublayers=("connections.{layer}.maps.{field}",),
                fields=OWN,
                exit="exit.{field}",
                exit_fields=OWN,
                marker=r"(^|\.)connections\.|\.maps\.",
            ),
            order=f"{ROWS}; columns of res, then rows, ..., rows last",
            direction="res[output, input]",
            norm_eps=1e-20,
            norm_eps_place="inside the root",
            hc_eps=0.0,
            post_factor=2.0,
            iterations=20,
            exit=None,
            numerics="paper",
            constraint="sinkhorn",
        ),
        Layout(
            name="deepseek_v4",
            source="DeepSeek-V4 and V4.1, files as released",
            family="deepseek_v4",
            names=Names(
                sublayers=("layers.{layer}.hc_attn_{field}", "layers.{layer}.hc_ffn_{field}"),
                fields=_packed(),
                exit="hc_head_{field}",
                exit_fields=_packed(),
                marker=r"(^|\.)hc_",
            ),
            iterations=20,
            exit="learned",
            constraint="sinkhorn",
            **DEEPSEEK,
        ),
        Layout(
            name="transformers",
            source="transformers 5.23.0, deepseek_v4 and glm5_next, names of modules",
            family="deepseek_v4",
            names=Names(
                sublayers=("layers.{layer}.attn_hc.{field}", "layers.{layer}.ffn_hc.{field}"),
                fields=_packed(),
                exit="hc_head.{field}",
                exit_fields=_packed("hc_"),
                prefix="model.",
                marker=r"_hc\.|(^|\.)hc_",
            ),
            iterations=20,
            exit="learned",
            constraint="sinkhorn",
            **DEEPSEEK,
        ),
    )
}
"""Layouts by name."""

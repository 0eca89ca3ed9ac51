"""The table of conventions, for `mhc convert --list` and the page of the layouts."""

from collections.abc import Iterator

from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.names import Field
from manifold_hc.interop.layouts.table import LAYOUTS


def conventions() -> Iterator[str]:
    """Yield the lines of the tables of all layouts, in Markdown."""
    layouts = list(LAYOUTS.values())
    yield from _table(
        ("layout", "library", "tensors of a sublayer", "learned exit"),
        [(one.name, one.source, _sublayers(one), _exit(one)) for one in layouts],
    )
    yield ""
    yield from _table(
        ("layout", "Sinkhorn-Knopp", "n*n rows", "iterations", "post", "exit"),
        [
            (
                one.name,
                one.order,
                one.direction,
                str(one.iterations),
                f"{one.post_factor:g} sigmoid",
                one.exit or "left to users",
            )
            for one in layouts
        ],
    )
    yield ""
    yield from _table(
        ("layout", "norm_eps", "hc_eps", "equal with numerics, constraint", "not representable"),
        [
            (
                one.name,
                f"{one.norm_eps:g} {one.norm_eps_place}",
                f"{one.hc_eps:g}",
                f"{one.numerics}, {one.constraint}",
                one.difference or "-",
            )
            for one in layouts
        ],
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', ', ') for cell in row)} |"


def _sublayers(layout: Layout) -> str:
    names = layout.names
    stems = " and ".join(
        f"`{names.prefix}{stem.format(layer='N', field='*')}`" for stem in names.sublayers
    )
    fields = ", ".join(_field(field) for field in names.fields)
    optional = f", optional `{names.fold}` [nC]" if names.fold else ""
    return f"{stems}: {fields}{optional}"


def _exit(layout: Layout) -> str:
    names = layout.names
    if names.exit is None:
        return "-"
    fields = ", ".join(_field(field, is_exit=True) for field in names.exit_fields)
    return f"`{names.prefix}{names.exit.format(field='*')}`: {fields}"


def _field(field: Field, is_exit: bool = False) -> str:
    rows, gates = ("n", "1") if is_exit else ("n*n+2n", "3")
    shapes = {
        "phi": f"[nC, {rows}]" if field.transposed else f"[{rows}, nC]",
        "bias": f"[{rows}]",
        "alpha": f"[{gates}]" if field.entry is None else str(list(field.entry_shape)),
    }
    return f"`{field.name}` {shapes[field.parameter]}"

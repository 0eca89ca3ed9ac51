"""The page about agreement: measured results, and those of libraries compared by hand."""

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from manifold_hc.verify.agreement import Agreement
from manifold_hc.verify.references import Library

INSTALLED = (
    "library",
    "compared",
    "preset",
    "order",
    "n*n rows",
    "n",
    "outputs",
    "gradients",
    "computed in",
    "note",
)

BY_HAND = ("library", "snapshot", "compared", "preset", "swap", "flip", "error", "note")


@cache
def by_hand() -> dict[str, Any]:
    """Return the libraries compared by hand, with the date and the commit of the comparison."""
    return tomllib.loads(_file("by_hand.toml"))


def page(found: Sequence[Agreement], missing: Sequence[Library], machine: str) -> str:
    """Return the page in Markdown. machine: sentence about where and when the results were made."""
    notes = [f"- **Not installed here**: {missing_sentence(one)}." for one in missing]
    values = {
        "machine": machine,
        "installed": _table(INSTALLED, [row(one) for one in found]),
        "missing": "".join(f"{line}\n" for line in notes),
        "by_hand": _table(BY_HAND, [_by_hand_row(one) for one in by_hand()["peer"]]),
        "commit": by_hand()["commit"],
        "date": str(by_hand()["date"]),
    }
    text = _file("agreement_page.md")
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def row(one: Agreement) -> list[str]:
    """Return the cells of one library, in the order of `INSTALLED`."""
    return [
        f"{one.package} {one.version}",
        one.part,
        one.numerics,
        one.constraint,
        {True: "transposed", False: "as ours", None: ""}[one.swap],
        ", ".join(map(str, one.streams)),
        f"{one.outputs:.0e}",
        f"{one.gradients:.0e}",
        one.precision,
        one.note,
    ]


def missing_sentence(library: Library) -> str:
    """Describe a library that is not installed."""
    return f"{library.package}, {library.part}; `pip install --no-deps {library.package}`"


def _by_hand_row(peer: dict[str, Any]) -> list[str]:
    error = peer.get("error")
    return [
        peer["name"],
        peer["snapshot"],
        peer["compared"],
        peer["preset"],
        "yes" if peer.get("swap") else "",
        "yes" if peer.get("flip") else "",
        "" if error is None else f"{error:.0e}" if error else "0",
        peer.get("note", ""),
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _file(name: str) -> str:
    return resources.files("manifold_hc.verify").joinpath(name).read_text(encoding="utf-8")

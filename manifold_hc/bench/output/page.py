"""The page of all benchmarks, made from the result files alone."""

from collections.abc import Iterator
from pathlib import Path

from manifold_hc.bench.output.results import Record, load_all

CHART = "![One connection, forward and backward, by implementation](images/benchmarks.svg)"

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
"""Heading of each kind of device."""

INTRODUCTION = """# Benchmarks

Made by `mhc bench page` from the files in `benchmarks/results/`; do not edit.

`mhc bench ops` times one connection, forward and backward, with the output of its branch given.
Every implementation is checked first: outputs and all gradients against float64. Then all of them
take turns, call by call in one process, each at the better of one and all threads; compiled code is
generated for every one. `mhc bench step` times the parts of a training step at the shapes of one of
the paper's models and adds them up to its full depth; the overhead is the time that mHC adds to the
layers, as a share of the whole step with residual connections. `mhc bench memory` counts the bytes
that a stack of connections holds for its backward pass, by the length of the recompute blocks.

To measure on your machine, and make this page and the chart again:

```bash dry
pip install 'manifold-hc[bench]'
mhc bench ops --save
mhc bench step --preset 3b --save
mhc bench memory --save
mhc bench page
```
"""


def page(folder: Path) -> str:
    """Return the page in Markdown. Raises DataError for a file that is no result file."""
    records = sorted(load_all(folder), key=lambda record: record.date)
    lines = [INTRODUCTION]
    if any(record.ops for record in records):
        lines += [CHART, ""]
    for kind, heading in DEVICES.items():
        lines += [f"## {heading}", ""]
        newest = {(r.machine.device, r.bench): r for r in records if r.machine.kind == kind}
        for _, record in sorted(newest.items()):
            lines += _section(record)
        if not newest:
            lines += ["Not measured.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(record: Record) -> Iterator[str]:
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    yield from (f"### {machine.device}: {record.bench}", "")
    yield (
        f"`{record.command}`, {record.date}, {machine.threads} threads, {versions}, "
        f"commit {record.commit or 'unknown'}."
    )
    yield ""
    sheets = [sheet for result in record.results for sheet in result.sheets()]
    for sheet in sheets:
        yield from sheet.markdown()
    for legend in dict.fromkeys(sheet.legend for sheet in sheets if sheet.legend):
        yield from (legend, "")

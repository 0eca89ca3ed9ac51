"""A sheet on a wide and on a narrow terminal, and as Markdown."""

from io import StringIO

import pytest
from rich.console import Console

from manifold_hc.bench.output.sheet import Sheet

SHEET = Sheet(
    title="invented [sizes]",
    columns=("name", "a | b", "seconds"),
    rows=[["first", "1", "2.5"], ["second", "10", "3"]],
    notes=["a note"],
    legend="seconds: of both",
    failures=["missing: third: not installed"],
)


def printed(width):
    file = StringIO()
    Console(file=file, width=80, force_terminal=False).print(SHEET.terminal(width))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_wide_terminal_has_one_line_for_each_row():
    assert printed(80) == [
        "invented [sizes]",
        "name    a | b  seconds",
        "first       1      2.5",
        "second     10        3",
        "missing: third: not installed",
        "a note",
        "seconds: of both",
        "",
    ]


@pytest.mark.parametrize(("width", "turned"), [(22, False), (21, True)])
def test_a_narrow_terminal_has_one_line_for_each_column(width, turned):
    lines = printed(width)
    assert (lines[1] == "name     first  second") == turned
    assert (lines[3].split() == ["seconds", "2.5", "3"]) == turned


def test_markdown_leaves_the_legend_to_the_page():
    assert list(SHEET.markdown()) == [
        "**invented [sizes]**",
        "",
        "| name | a \\| b | seconds |",
        "| --- | ---: | ---: |",
        "| first | 1 | 2.5 |",
        "| second | 10 | 3 |",
        "",
        "- missing: third: not installed",
        "- a note",
        "",
    ]

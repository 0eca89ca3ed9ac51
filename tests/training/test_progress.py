"""Progress view of a run in a terminal."""

import io

import pytest
from rich.console import Console

from manifold_hc.training.sinks.progress import ProgressView

FIGURES = {
    "loss": 2.1571,
    "norm": 0.52341,
    "tokens/s": 12345.6,
    "validation": 2.1624,
    "gain": 1.0002,
    "backward": 1.3901,
    "load": 1.2345,
}


@pytest.mark.parametrize("width", [40, 80, 110, 119, 130, 169, 170, 200])
def test_no_figure_is_broken_at_any_width(width):
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    view = ProgressView(console, "mhc constraint=identity, seed 2", 300)
    view.open()
    view.end_step(299, FIGURES)
    view.close()
    last = screen.getvalue().rpartition("\x1b[2K")[2].splitlines()
    assert all(len(line) <= width for line in last)
    for name, value in FIGURES.items():
        assert any(f"{name} {value:.4g}" in line for line in last), name
    assert any("300/300" in line for line in last)

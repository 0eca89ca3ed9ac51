"""Plots of a report, as matplotlib figures."""

import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from manifold_hc.report.runs import Run

COLOURS = ("#5b6472", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#66a182", "#2e4057", "#a44a3f")

GAINS = (0.5, 2.0)
"""Smallest range of an axis of gains, so that rounding noise around 1 does not fill it."""

NOISE = (-0.01, 0.01)
"""Smallest range of an axis of differences."""

Range = tuple[float, float]

Series = Callable[[Run], tuple[np.ndarray, np.ndarray]]
"""Returns x and y of one line of a run."""


def loss(runs: Sequence[Run], baseline: str | None) -> Figure:
    """Plot the training loss and its difference to the baseline."""
    return _with_difference(
        runs, baseline, lambda run: _smooth(run.series("step", "loss")), "training loss (nats)"
    )


def validation(runs: Sequence[Run], baseline: str | None) -> Figure:
    """Plot the validation loss at every validation and its difference to the baseline."""
    figure = _with_difference(
        runs, baseline, lambda run: run.series("validation", "loss"), "validation loss (nats)"
    )
    for axis in figure.axes:
        for line in axis.lines:
            line.set_marker("o")
    return figure


def gradient_norm(runs: Sequence[Run], baseline: str | None) -> Figure:
    """Plot the gradient norm before clipping and its difference to the baseline."""
    return _with_difference(
        runs, baseline, lambda run: _smooth(run.series("step", "gradient_norm")), "gradient norm"
    )


def gain_over_training(runs: Sequence[Run]) -> Figure:
    """Plot the largest composite gain over depth at every probed step."""
    figure, axes = _panels(2)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        _lines(axis, runs, lambda run, d=direction: run.series("gain", f"gain_{d}"))  # type: ignore[misc]
        _label(axis, f"composite gain, {direction}", "step", "largest over depth")
        _as_gains(axis)
    axes[0].legend(frameon=False)
    return figure


def gain_over_depth(runs: Sequence[Run]) -> Figure:
    """Plot the single and composite gain of every sublayer at the last step."""
    figure, axes = _panels(2, 2)
    rows = ("forward", "backward", "composite_forward", "composite_backward")
    for axis, row in zip(axes, rows, strict=True):

        def at_depth(run: Run, row: str = row) -> tuple[np.ndarray, np.ndarray]:
            values = np.array(run.gains[-1]["gains"][row]) if run.gains else np.empty(0)
            return np.arange(len(values)), values

        _lines(axis, runs, at_depth)
        title = row.replace("_", " gain, ") if "_" in row else f"single gain, {row}"
        _label(axis, title, "sublayer", "mean over tokens")
        _as_gains(axis)
    axes[0].legend(frameon=False)
    return figure


def streams_over_depth(runs: Sequence[Run]) -> Figure:
    """Plot cosine and effective rank of the streams of every sublayer at the last step."""
    figure, axes = _panels(2)
    most = max([2, *(len(run.gains[-1]["composite"][0]) for run in runs if run.gains)])
    for axis, key, title, least in (
        (axes[0], "stream_cosine", "mean cosine between streams", (0.0, 1.0)),
        (axes[1], "stream_rank", "effective rank of the streams", (1.0, float(most))),
    ):

        def at_depth(run: Run, key: str = key) -> tuple[np.ndarray, np.ndarray]:
            values = np.array(run.gains[-1][key]) if run.gains else np.empty(0)
            return np.arange(len(values)), values

        _lines(axis, runs, at_depth)
        _label(axis, title, "sublayer", "")
        _widen(axis, least)
    axes[0].legend(frameon=False)
    return figure


def composite_matrices(runs: Sequence[Run]) -> Figure:
    """Plot each variant's composite matrix of the whole network, mean over tokens, first seed."""
    first = {run.variant: run for run in reversed(runs) if run.gains}
    chosen = [first[name] for name in dict.fromkeys(run.variant for run in runs) if name in first]
    figure, axes = _panels(max(1, len(chosen)), width=3.2, height=3.0)
    for axis, run in zip(axes, chosen, strict=False):
        matrix = np.array(run.gains[-1]["composite"][0])
        largest = max(1.0, np.abs(matrix).max())
        axis.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest)
        for (o, i), value in np.ndenumerate(matrix):
            shade = "white" if abs(value) > 0.6 * largest else "black"
            axis.text(i, o, f"{value:.3g}", ha="center", va="center", fontsize=7, color=shade)
        axis.set(title=run.variant, xlabel="input stream", ylabel="output stream")
        axis.set_xticks(range(len(matrix)))
        axis.set_yticks(range(len(matrix)))
    return figure


def overview(runs: Sequence[Run]) -> Figure:
    """Plot loss, gain over training and gain over depth in one row."""
    figure, axes = _panels(3, width=4.2)
    _lines(axes[0], runs, lambda run: _smooth(run.series("step", "loss")))
    _label(axes[0], "training loss (nats)", "step", "")
    _lines(axes[1], runs, lambda run: run.series("gain", "gain_forward"))
    _label(axes[1], "largest composite gain, forward", "step", "")
    _as_gains(axes[1])

    def backward_at_depth(run: Run) -> tuple[np.ndarray, np.ndarray]:
        values = np.array(run.gains[-1]["gains"]["composite_backward"] if run.gains else [])
        return np.arange(len(values)), values

    _lines(axes[2], runs, backward_at_depth)
    _label(axes[2], "composite gain, backward, at the end", "sublayer", "")
    _as_gains(axes[2])
    if axes[1].lines:
        axes[1].legend(frameon=False)
    return figure


def to_svg(figure: Figure) -> str:
    """Return the figure as an SVG element; equal figures give equal bytes."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "manifold-hc", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _with_difference(
    runs: Sequence[Run], baseline: str | None, series: Series, title: str
) -> Figure:
    """Plot a series of every run, and its difference to the baseline run of the same seed."""
    figure, axes = _panels(1 if baseline is None else 2)
    _lines(axes[0], runs, series)
    _label(axes[0], title, "step", "")
    if axes[0].lines:
        axes[0].legend(frameon=False)
    if baseline is not None:
        base = {run.seed: series(run) for run in runs if run.variant == baseline}

        def difference(run: Run) -> tuple[np.ndarray, np.ndarray]:
            (steps, values), (_, other) = series(run), base[run.seed]
            length = min(len(values), len(other))
            return steps[:length], values[:length] - other[:length]

        _lines(axes[1], [run for run in runs if run.seed in base], difference)
        _label(axes[1], f"difference to {baseline}", "step", "")
        _widen(axes[1], NOISE)
    return figure


def _lines(axis: Axes, runs: Sequence[Run], series: Series) -> None:
    """Draw a line for each variant, mean over seeds, with a band from smallest to largest."""
    names = list(dict.fromkeys(run.variant for run in runs))
    for index, (colour, name) in enumerate(zip(COLOURS * 8, names, strict=False)):
        found = [series(run) for run in runs if run.variant == name]
        length = min(len(values) for _, values in found)
        if not length:
            continue
        steps, values = found[0][0][:length], np.stack([v[:length] for _, v in found])
        # Lines drawn first are wider, so that a line under another one is visible.
        width = min(4.0, 1.5 + 1.2 * (len(names) - 1 - index))
        axis.plot(steps, values.mean(0), color=colour, label=name, linewidth=width)
        if len(found) > 1:
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)


def _smooth(series: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the running mean over 3 % of the run, over fewer steps at its start."""
    steps, values = series
    window = max(1, round(0.03 * len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return steps, (sums[end] - sums[start]) / (end - start)


def _panels(
    columns: int, rows: int = 1, width: float = 5.2, height: float = 3.4
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def _widen(axis: Axes, least: Range) -> None:
    """Widen the y axis to at least the range `least`, plus a margin."""
    margin = 0.04 * (least[1] - least[0])
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, least[0] - margin), max(high, least[1] + margin))


def _as_gains(axis: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers and at least the range `GAINS`."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    low, high = min(low, GAINS[0]), max(high, GAINS[1])
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())

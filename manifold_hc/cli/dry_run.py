"""`mhc train --dry-run`: sizes and learning rates of a configuration."""

import math

from rich.table import Table

from manifold_hc.cli.terminal import console
from manifold_hc.training import OptimizerConfig, RunConfig

UNITS = ("", "K", "M", "B", "T")


def show_plan(config: RunConfig) -> None:
    """Print parameter counts, tokens, and the learning rate at the steps where it changes."""
    import torch

    from manifold_hc.models import Decoder, count_parameters
    from manifold_hc.training.optimizer import learning_rate

    with torch.device("meta"):
        count = count_parameters(
            Decoder(config.model, config.connection, config.training.recompute)
        )
    training, sequence = config.training, config.data.sequence
    tokens = training.steps * training.batch * sequence
    budget = f"{training.steps:,} steps of {training.batch:,} sequences of {sequence:,}"
    rows = [
        ("active parameters", short(count.active), f"{count.active:,}"),
        ("total parameters", short(count.total), f"{count.total:,}"),
        ("vocabulary parameters", short(count.vocabulary), f"{count.vocabulary:,}"),
        ("tokens", short(tokens), budget),
    ]
    if config.parallel.size > 1:
        rows.append(("processes", str(config.parallel.size), _layout(config)))
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    for step in _turning_points(training.steps, config.optimizer):
        rate = learning_rate(step, training.steps, config.optimizer)
        table.add_row(f"learning rate at step {step}", f"{rate:.4g}")
    console().print(table)


def _layout(config: RunConfig) -> str:
    """Degrees of parallelism, with stages and microbatches of a pipeline."""
    parallel, microbatches = config.parallel, config.training.accumulate
    if parallel.pipeline == 1:
        return str(parallel)
    stages, size = parallel.num_stages, config.training.batch // parallel.dp_size // microbatches
    return (
        f"{parallel}; {parallel.schedule} over {stages} stages of {config.model.blocks // stages} "
        f"blocks, microbatches: {microbatches} of {size:,} sequences"
    )


def short(count: int) -> str:
    """Format a count with three significant digits and a unit, such as 4.14B."""
    power = min(len(UNITS) - 1, int(math.log10(max(count, 1))) // 3)
    value = f"{count / 1000**power:.3g}"
    if float(value) >= 1000 and power < len(UNITS) - 1:
        value, power = f"{float(value) / 1000:.3g}", power + 1
    digits = value if "." in value or len(value) >= 3 or not power else f"{float(value):.2f}"[:4]
    return f"{digits}{UNITS[power]}"


def _turning_points(steps: int, config: OptimizerConfig) -> list[int]:
    """First step, end of the warm-up, and steps at which the schedule steps down or ends."""
    late = [math.ceil(0.8 * steps), math.ceil(0.9 * steps)]
    steps_shown = [0, config.warmup, *(late if config.schedule == "step" else [steps - 1])]
    return sorted({step for step in steps_shown if step < steps})

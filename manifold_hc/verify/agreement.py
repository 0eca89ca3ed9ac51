"""Agreement with the installed libraries that have mHC: outputs and all gradients."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import cast, get_args

import torch

from manifold_hc.bench import peers
from manifold_hc.bench.correctness import TOLERANCE, check, relative_error
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import quiet
from manifold_hc.config import ConnectionConfig
from manifold_hc.interop.layouts import LAYOUTS
from manifold_hc.interop.layouts.native import transpose_res
from manifold_hc.numerics import preset
from manifold_hc.stack import Stack
from manifold_hc.verify import conventions
from manifold_hc.verify.conventions import Convention, Direction, Last, Weights
from manifold_hc.verify.evidence import Evidence, weights_of
from manifold_hc.verify.observation import Observation
from manifold_hc.verify.parity import (
    CHANNELS,
    SUBLAYERS,
    Model,
    Pass,
    random_model,
    random_stack,
    run_models,
    run_stack,
)
from manifold_hc.verify.references import LIBRARIES, Library

STREAMS = (2, 3, 8, 4)
"""Numbers of streams; the orders of Sinkhorn-Knopp differ most at the last one."""

CLOSE = 1e-3
"""Largest error of the order and direction that explain the streams."""

DISTINCT = 20.0
"""Least ratio of the second smallest error to the smallest."""

UNKNOWN = "unknown"
"""In place of a constraint: no order explains the streams."""


@dataclass
class Agreement:
    """Result of comparing one library."""

    package: str
    version: str
    part: str
    """Part of the package that was compared."""
    numerics: str
    """Preset of ours that it equals; "other maths" if its own equations were compared."""
    constraint: str
    """Constraint of ours that it equals, as measured; "" for other maths, UNKNOWN for none."""
    swap: bool | None
    """True if the n*n rows of its phi and bias are ours transposed, as measured; None if it has
    other maps."""
    streams: tuple[int, ...]
    """Numbers of streams that were compared."""
    precision: str
    """Dtype in which its code ran; ours is float64."""
    outputs: float
    """Largest relative error of u, x' and the exit."""
    gradients: float
    """Largest relative error of the gradients of x, y and all parameters."""
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """True if the order is known and all errors are within the tolerance; false for NaN."""
        return self.constraint != UNKNOWN and max(self.outputs, self.gradients) <= self.tolerance


def agreements() -> Iterator[Agreement | Library]:
    """Compare every library that is installed; yield the others as they are."""
    for library in LIBRARIES:
        yield library if library.version is None else compare_library(library)
    if (other := _separate_streams()) is not None:
        yield other


def compare_library(library: Library, streams: Sequence[int] = STREAMS) -> Agreement:
    """Compare a library's code with ours at several numbers of streams.

    Parameters are random and not symmetric; ours are converted to the library's layout, and its
    gradients back to ours, so that both directions of the conversion are part of the comparison.

    Args:
        library: The library.
        streams: Numbers of streams; those that the library does not take are left out.

    Returns:
        Errors, and the order and direction that explain the library's streams at the last number.

    Raises:
        MissingExtraError: If a package that the library needs is not installed.
    """
    layout = LAYOUTS[library.layout]
    counts = tuple(n for n in streams if not library.streams or n in library.streams)
    stacks = [random_stack(_config(library, n)) for n in counts]
    models = [random_model(library, stack) for stack in stacks]
    outputs = gradients = 0.0
    for stack, model, theirs in zip(
        stacks, models, library.run(run_models, library, models), strict=True
    ):
        exits = len(theirs.outputs) > 2 * SUBLAYERS
        own = run_stack(stack, model.inputs, exits)
        back = layout.to_native(theirs.parameters, stack.config)
        outputs = max([outputs, *map(relative_error, theirs.outputs, own.outputs)])
        wanted = [own.parameters[name] for name in back]
        pairs = zip([*theirs.inputs, *back.values()], [*own.inputs, *wanted], strict=True)
        gradients = max(gradients, *(relative_error(found, exact) for found, exact in pairs))
    order, swap = _measure_order(library, stacks[-1], models[-1], theirs)
    return Agreement(
        library.package,
        library.version or "",
        library.part,
        stacks[0].config.numerics,
        order,
        swap,
        tuple(sorted(counts)),
        str(library.precision).removeprefix("torch."),
        outputs,
        gradients,
        TOLERANCE[library.precision],
        layout.difference,
    )


def _measure_order(
    library: Library, stack: Stack, model: Model, theirs: Pass
) -> tuple[str, bool | None]:
    """Find the order and the direction that explain the library's streams after one sublayer.

    Returns our constraint of that order, and True if the library's n*n rows are ours transposed;
    (UNKNOWN, None) unless exactly one of the four possibilities explains them.
    """
    base = cast(Convention, conventions.of(stack.config))
    weights = cast(Weights, weights_of(stack, 0))
    if LAYOUTS[library.layout].names.swaps_res:
        n = stack.config.n
        weights = Weights(
            transpose_res(weights.phi, n), weights.alpha, transpose_res(weights.bias, n)
        )
    observation = Observation(0, model.inputs[0], {"new": theirs.outputs[1]})
    evidence = Evidence(observation, {"new": CLOSE}, weights, None, single_pass=False)
    errors = {
        one: evidence.excess(one)
        for direction, last in product(get_args(Direction), get_args(Last))
        if (one := replace(base, direction=direction, last=last))
    }
    best, second = sorted(errors, key=errors.__getitem__)[:2]
    if errors[best] > 1 or errors[second] < DISTINCT * errors[best]:
        return UNKNOWN, None
    transposed = best.direction == "transposed"
    columns_of_res = transposed == (best.last == "rows")
    return (
        "sinkhorn_columns" if columns_of_res else "sinkhorn",
        transposed != preset(stack.config.numerics).res_is_transposed,
    )


def _config(library: Library, n: int) -> ConnectionConfig:
    if library.numerics == "glm5":
        return ConnectionConfig(streams=n, numerics="glm5")
    config = LAYOUTS[library.layout].config(n)
    return replace(config, exit="mean") if config.exit is None else config


def _separate_streams() -> Agreement | None:
    """Compare hyper-connections, whose maps are others, with its equations on our operators."""
    (peer,) = (one for one in peers.PEERS if one.package == "hyper-connections")
    if peer.version is None:
        return None
    error = 0.0
    for n in STREAMS:
        inputs = Problem(tokens=8, streams=n, channels=CHANNELS).inputs()
        with quiet():
            error = max(error, check(peer.build(Problem(8, n, CHANNELS), inputs), inputs).error)
    return Agreement(
        peer.package,
        peer.version,
        "mHCv2",
        "other maths",
        "",
        None,
        tuple(sorted(STREAMS)),
        "float32",
        error,
        error,
        TOLERANCE[torch.float32],
        peer.note,
    )

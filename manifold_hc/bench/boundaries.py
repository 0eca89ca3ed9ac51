"""The boundary between two sublayers, by separate operators and fused, timed in a run of four."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_hc import functional
from manifold_hc.bench.correctness import TOLERANCE, compare
from manifold_hc.bench.measure.timing import Timing, measure, thread_counts, timed
from manifold_hc.bench.output.sheet import Sheet, medians
from manifold_hc.bench.problem import Inputs, Problem
from manifold_hc.bench.task import Task, leaf
from manifold_hc.errors import ManifoldError

DEPTH = 4
"""Sublayers in a run; each but the first begins with a boundary."""

SEPARATE, LINKED, FUSED = "separate operators", "read and write linked", "fused boundary"
SINGLE, SINGLE_FUSED = "single pass, separate operators", "single pass, fused"

BASELINES = {SINGLE: SINGLE, SINGLE_FUSED: SINGLE}
"""Form that a form is compared with; `SEPARATE` for the others."""

EPS = 1e-6
"""Epsilon of the input norms."""

LEGEND = (
    "vs separate: times as fast as separate operators. Elements per token and sublayer, forward, "
    "with the input norm: separate (4n + 4)C, fused (3n + 2)C, single pass (2n + 2)C; on a CPU a "
    "group of tokens stays in cache, and fused is (2n + 2)C too; on a GPU the norm adds 2C."
)


@dataclass
class BoundaryRow(Timing):
    """One form of the run; seconds are those of one sublayer."""

    form: str
    norm: bool
    """True if the sublayers' input norms are included."""
    backend: str


def bench_boundaries(problem: Problem, backend: str, rounds: int) -> list[BoundaryRow]:
    """Time every form, without and with input norms; all take turns.

    Raises ManifoldError for a form with wrong results.
    """
    for norm in (False, True):
        require_correct(problem, backend, norm)
    rows = [BoundaryRow(form, norm, backend) for norm in (False, True) for form in FORMS]
    tasks = [run_of_sublayers(problem, backend, FORMS[row.form], row.norm) for row in rows]
    runs = [timed(task, passes=DEPTH) for task in tasks]
    measure(rows, runs, rounds, [thread_counts(problem.device)] * len(runs))
    return rows


def require_correct(problem: Problem, backend: str, norm: bool) -> None:
    """Compare all outputs and gradients of every form with separate operators in float64."""
    exact = replace(problem, dtype="float64")
    tolerance = DEPTH * TOLERANCE[problem.torch_dtype]
    wanted = {
        form: run_of_sublayers(exact, "reference", FORMS[form], norm, numbers_of=problem).tensors()
        for form in (SEPARATE, SINGLE)
    }
    for form, run in FORMS.items():
        task = run_of_sublayers(problem, backend, run, norm)
        names = [f"output {k}" for k in range(len(task.cotangents))]
        names += [f"gradient of input {k}" for k in range(len(task.leaves))]
        found = compare(task.tensors(), wanted[BASELINES.get(form, SEPARATE)], names, tolerance)
        if not found.ok:
            raise ManifoldError(
                f"bench ops: {form}, {backend}, is wrong: {found.worst} is off by "
                f"{found.error:.1e}, {tolerance:.1e} is allowed; nothing is printed"
            )


def boundaries_sheet(rows: Sequence[BoundaryRow], peer_name: str, peer: Timing | None) -> Sheet:
    """One row for each form; `peer`, whose connection has no norms, is compared in the notes."""
    totals = {(row.form, row.norm): row.total for row in rows}
    return Sheet(
        f"One sublayer with its boundary, in a run of {DEPTH}",
        ("form", "forward ms", "backward ms", "total ms", "vs separate"),
        [
            [
                f"{row.form}{', with norms' * row.norm}, {row.backend}",
                *medians(row),
                f"{totals[BASELINES.get(row.form, SEPARATE), row.norm] / row.total:.2f}",
            ]
            for row in rows
        ],
        [
            f"a sublayer, {row.form}: {peer_name} takes {peer.total / row.total:.2f} times as long"
            for row in rows
            if peer is not None and row.form in (FUSED, SINGLE_FUSED) and not row.norm
        ],
        LEGEND,
    )


class Sublayer(NamedTuple):
    """Map parameters, norm weight and branch output of one sublayer."""

    phi: Tensor
    alpha: Tensor
    bias: Tensor
    weight: Tensor
    y: Tensor

    @property
    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters of the coefficient maps, in the functions' order."""
        return self.phi, self.alpha, self.bias


class Options(NamedTuple):
    """Settings of a run."""

    backend: str
    numerics: str
    norm: bool

    def normalise(self, u: Tensor, own: Sublayer) -> Tensor:
        """Apply the sublayer's input norm, if norms are included."""
        if not self.norm:
            return u
        return torch.nn.functional.rms_norm(u, u.shape[-1:], own.weight.to(u.dtype), EPS)


Form = Callable[[Tensor, Sequence[Sublayer], Options], list[Tensor]]
"""(streams, sublayers, options) -> every sublayer's input, then the last streams."""


def _separate(
    x: Tensor, sublayers: Sequence[Sublayer], options: Options, single_pass: bool
) -> list[Tensor]:
    inputs, previous_pre = [], _first_read(x)
    for own in sublayers:
        pre, post, res = functional.coefficients(
            x, *own.maps, numerics=options.numerics, backend=options.backend
        )
        u = functional.read(x, previous_pre if single_pass else pre, options.backend)
        inputs.append(options.normalise(u, own))
        x, previous_pre = functional.write(x, own.y, post, res, options.backend), pre
    return [*inputs, x]


def _linked(x: Tensor, sublayers: Sequence[Sublayer], options: Options) -> list[Tensor]:
    inputs = []
    for own in sublayers:
        reading = functional.coefficients_and_read(
            x, *own.maps, numerics=options.numerics, backend=options.backend
        )
        inputs.append(options.normalise(reading.u, own))
        x = _write(reading, own, options)
    return [*inputs, x]


def _fused(
    x: Tensor, sublayers: Sequence[Sublayer], options: Options, single_pass: bool
) -> list[Tensor]:
    first, *others = sublayers
    choices: dict[str, Any] = {"numerics": options.numerics, "backend": options.backend}
    reading = functional.coefficients_and_read(x, *first.maps, **choices)
    u = functional.read(x, _first_read(x), options.backend) if single_pass else reading.u
    inputs, previous = [options.normalise(u, first)], first
    for own in others:
        reading = functional.boundary(
            reading.x,
            previous.y,
            reading.post,
            reading.res,
            *own.maps,
            pre=reading.pre if single_pass else None,
            input_norm=functional.InputNorm(own.weight, EPS) if options.norm else None,
            link=reading.link,
            **choices,
        )
        inputs.append(reading.u)
        previous = own
    return [*inputs, _write(reading, previous, options)]


FORMS: dict[str, Form] = {
    SEPARATE: partial(_separate, single_pass=False),
    LINKED: _linked,
    FUSED: partial(_fused, single_pass=False),
    SINGLE: partial(_separate, single_pass=True),
    SINGLE_FUSED: partial(_fused, single_pass=True),
}


def _write(reading: functional.Reading, own: Sublayer, options: Options) -> Tensor:
    """Write the sublayer's output, its backward linked with that of the reading."""
    return functional.write(
        reading.x, own.y, reading.post, reading.res, options.backend, link=reading.link
    )


def _first_read(x: Tensor) -> Tensor:
    """Single-pass read weights of the first sublayer: one-hot on stream 0."""
    weights = torch.zeros(x.shape[-2], dtype=torch.float32, device=x.device)
    weights[0] = 1
    return weights.to(torch.promote_types(x.dtype, torch.float32))


def run_of_sublayers(
    problem: Problem, backend: str, form: Form, norm: bool, numbers_of: Problem | None = None
) -> Task:
    """Return a run of DEPTH sublayers in one form.

    numbers_of: problem whose rounded inputs it gets, converted to its own dtype.
    """
    options = Options(backend, problem.numerics, norm)
    given = [(numbers_of or problem).inputs(seed) for seed in range(DEPTH)]
    if numbers_of is not None:
        given = [Inputs(*(t.to(problem.torch_dtype) for t in inputs)) for inputs in given]
    ones = torch.ones(problem.channels, dtype=given[0].phi.dtype, device=problem.device)
    sublayers = [Sublayer(*map(leaf, (i.phi, i.alpha, i.bias, ones, i.y))) for i in given]
    x = leaf(given[0].x)
    used = [t for own in sublayers for t in own if norm or t is not own.weight]
    cotangents = (*(i.grad_u for i in given), given[0].grad_new)
    return Task(lambda: form(x, sublayers, options), (x, *used), cotangents)

"""The boundary between two sublayers, by separate operators and fused, timed in a run of four."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_hc import functional
from manifold_hc.bench.correctness import TOLERANCE, compare
from manifold_hc.bench.measure.timing import Timing, measure, thread_counts, timed
from manifold_hc.bench.output.sheet import TIMES, Sheet
from manifold_hc.bench.problem import Inputs, Problem
from manifold_hc.bench.task import Task, leaf
from manifold_hc.errors import ManifoldError
from manifold_hc.functional import InputNorm
from manifold_hc.maps import first_read_weights

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
    turns = []
    for norm, (form, run) in product((False, True), FORMS.items()):
        task = run_of_sublayers(problem, backend, run, norm)
        turns.append((BoundaryRow(form, norm, backend), timed(task, passes=DEPTH)))
    measure(turns, rounds, [thread_counts(problem.device)] * len(turns))
    return [row for row, _ in turns]


def require_correct(problem: Problem, backend: str, norm: bool) -> None:
    """Compare all outputs and gradients of every form with separate operators in float64."""
    tolerance = DEPTH * TOLERANCE[problem.torch_dtype]
    wanted = {
        form: run_of_sublayers(problem, "reference", FORMS[form], norm, exact=True).tensors()
        for form in (SEPARATE, SINGLE)
    }
    for form, run in FORMS.items():
        task = run_of_sublayers(problem, backend, run, norm)
        names = [f"output {k}" for k in range(len(task.cotangents))]
        names += [f"gradient of input {k}" for k in range(len(task.leaves))]
        exact_tensors = wanted[BASELINES.get(form, SEPARATE)]
        found = compare(task.tensors(), exact_tensors, names, lambda tensor: tolerance)
        if not found.ok:
            raise ManifoldError(
                f"bench ops: {form}, {backend}, is wrong: {found.worst} is off by "
                f"{found.error:.1e}, {tolerance:.1e} is allowed; nothing is printed"
            )


def boundaries_sheet(rows: Sequence[BoundaryRow], peer_name: str, peer: Timing | None) -> Sheet:
    """One row for each form; `peer`, whose connection has no norms, is compared in the notes."""
    totals = {(row.form, row.norm): row.total for row in rows}
    columns: dict[str, Callable[[BoundaryRow], str]] = {
        "form": lambda row: f"{row.form}{', with norms' * row.norm}, {row.backend}",
        **TIMES,
        "vs separate": lambda row: (
            f"{totals[BASELINES.get(row.form, SEPARATE), row.norm] / row.total:.2f}"
        ),
    }
    notes = [
        f"a sublayer, {row.form}: {peer_name} takes {peer.total / row.total:.2f} times as long"
        for row in rows
        if peer is not None and row.form in (FUSED, SINGLE_FUSED) and not row.norm
    ]
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    title = f"One sublayer with its boundary, in a run of {DEPTH}"
    return Sheet(title, list(columns), cells, notes, LEGEND)


class Sublayer(NamedTuple):
    """Map parameters (phi, alpha, bias), input norm and branch output of one sublayer."""

    maps: tuple[Tensor, Tensor, Tensor]
    norm: InputNorm | None
    y: Tensor

    def normalise(self, u: Tensor) -> Tensor:
        """Apply the input norm, if there is one."""
        if self.norm is None:
            return u
        weight, eps = self.norm
        return torch.nn.functional.rms_norm(u, u.shape[-1:], weight.to(u.dtype), eps)


Form = Callable[[Tensor, Sequence[Sublayer], str, str], list[Tensor]]
"""(streams, sublayers, numerics, backend) -> every sublayer's input, then the last streams."""


def _separate(
    x: Tensor, sublayers: Sequence[Sublayer], numerics: str, backend: str, single_pass: bool
) -> list[Tensor]:
    inputs: list[Tensor] = []
    for own in sublayers:
        pre, post, res = functional.coefficients(x, *own.maps, numerics=numerics, backend=backend)
        if not inputs:
            previous_pre = first_read_weights(pre)
        u = functional.read(x, previous_pre if single_pass else pre, backend)
        inputs.append(own.normalise(u))
        x, previous_pre = functional.write(x, own.y, post, res, backend), pre
    return [*inputs, x]


def _linked(x: Tensor, sublayers: Sequence[Sublayer], numerics: str, backend: str) -> list[Tensor]:
    inputs = []
    for own in sublayers:
        reading = functional.coefficients_and_read(x, *own.maps, numerics=numerics, backend=backend)
        inputs.append(own.normalise(reading.u))
        x = functional.write(x, own.y, reading.post, reading.res, backend, link=reading.link)
    return [*inputs, x]


def _fused(
    x: Tensor, sublayers: Sequence[Sublayer], numerics: str, backend: str, single_pass: bool
) -> list[Tensor]:
    previous, *others = sublayers
    reading = functional.coefficients_and_read(
        x, *previous.maps, numerics=numerics, backend=backend
    )
    u = functional.read(x, first_read_weights(reading.pre), backend) if single_pass else reading.u
    inputs = [previous.normalise(u)]
    for own in others:
        reading = functional.boundary(
            reading.x,
            previous.y,
            reading.post,
            reading.res,
            *own.maps,
            pre=reading.pre if single_pass else None,
            input_norm=own.norm,
            link=reading.link,
            numerics=numerics,
            backend=backend,
        )
        inputs.append(reading.u)
        previous = own
    x, y, link = reading.x, previous.y, reading.link
    return [*inputs, functional.write(x, y, reading.post, reading.res, backend, link=link)]


FORMS: dict[str, Form] = {
    SEPARATE: partial(_separate, single_pass=False),
    LINKED: _linked,
    FUSED: partial(_fused, single_pass=False),
    SINGLE: partial(_separate, single_pass=True),
    SINGLE_FUSED: partial(_fused, single_pass=True),
}


def run_of_sublayers(
    problem: Problem, backend: str, form: Form, norm: bool, exact: bool = False
) -> Task:
    """Return a run of DEPTH sublayers in one form; if `exact`, in float64 on the same numbers."""
    given = [problem.inputs(seed) for seed in range(DEPTH)]
    if exact:
        given = [Inputs(*(tensor.double() for tensor in inputs)) for inputs in given]
    x, sublayers, leaves = leaf(given[0].x), [], []
    for inputs in given:
        phi, alpha, bias, y = map(leaf, (inputs.phi, inputs.alpha, inputs.bias, inputs.y))
        weight = leaf(phi.new_ones(problem.channels))
        input_norm = InputNorm(weight, EPS) if norm else None
        sublayers.append(Sublayer((phi, alpha, bias), input_norm, y))
        leaves += [phi, alpha, bias, y, *([weight] if norm else [])]
    cotangents = (*(inputs.grad_u for inputs in given), given[0].grad_new)
    return Task(lambda: form(x, sublayers, problem.numerics, backend), (x, *leaves), cotangents)

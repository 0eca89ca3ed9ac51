"""What lies between two sublayers, by separate operators and fused: a run of sublayers each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_hc import functional
from manifold_hc.bench.correctness import TOLERANCE, judge
from manifold_hc.bench.measure.timing import measure, thread_counts, timed
from manifold_hc.bench.problem import Inputs, Problem
from manifold_hc.bench.task import Task, leaf
from manifold_hc.errors import ManifoldError
from manifold_hc.functional import InputNorm

DEPTH = 4
"""Sublayers in a row; all but the first begin with a boundary."""

SEPARATE, PAIRED, FUSED = "separate operators", "read and write linked", "fused boundary"
SINGLE, SINGLE_FUSED = "single pass, separate operators", "single pass, fused"

BASELINES = {SINGLE: SINGLE, SINGLE_FUSED: SINGLE}
"""What a form is compared with, where that is not the standard one by separate operators."""


@dataclass
class BoundaryRow:
    """One way to compute the same run of sublayers."""

    form: str
    norm: bool
    """Whether the sublayers' input norms are counted."""
    backend: str
    forward: list[float]
    """Seconds a sublayer, every sample, and so `backward`."""
    backward: list[float]
    threads: int

    @property
    def total(self) -> float:
        """Median seconds a sublayer."""
        return median(a + b for a, b in zip(self.forward, self.backward, strict=True))


class Maps(NamedTuple):
    """A sublayer's parameters and its branch's output."""

    phi: Tensor
    alpha: Tensor
    bias: Tensor
    weight: Tensor
    y: Tensor

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the functions take them."""
        return self.phi, self.alpha, self.bias


EPS = 1e-6
"""Of the input norms."""


def bench_boundaries(problem: Problem, backend: str, rounds: int) -> list[BoundaryRow]:
    """Every form, without and with the input norms; all take turns.

    Raises ManifoldError for one that is wrong.
    """
    forms = [(form, norm) for norm in (False, True) for form in FORMS]
    for norm in (False, True):
        require_right(problem, backend, norm)
    runs = [timed(task(problem, backend, FORMS[form], norm)) for form, norm in forms]
    timings = measure(runs, [thread_counts(problem.device)] * len(runs), rounds)
    return [
        BoundaryRow(
            form,
            norm,
            backend,
            [sample.forward / DEPTH for sample in timing.samples],
            [sample.backward / DEPTH for sample in timing.samples],
            timing.threads,
        )
        for (form, norm), timing in zip(forms, timings, strict=True)
    ]


def require_right(problem: Problem, backend: str, norm: bool) -> None:
    """Compare every form, all outputs and gradients, with separate operators in float64."""
    exact = replace(problem, dtype="float64")
    tolerance = DEPTH * TOLERANCE[problem.torch_dtype]
    for baseline in (SEPARATE, SINGLE):
        given = task(exact, "reference", FORMS[baseline], norm, like=problem)
        wanted = given.tensors()
        names = [f"output {k}" for k in range(len(given.cotangents))]
        names += [f"gradient of input {k}" for k in range(len(given.leaves))]
        for form in FORMS:
            if BASELINES.get(form, SEPARATE) != baseline:
                continue
            found = task(problem, backend, FORMS[form], norm).tensors()
            verdict = judge(found, wanted, names, tolerance)
            if not verdict.ok:
                raise ManifoldError(
                    f"bench ops: {form}, {backend}, is wrong: {verdict.worst} is off by "
                    f"{verdict.error:.1e}, {tolerance:.1e} is allowed; nothing is printed"
                )


Form = Callable[[Tensor, Sequence[Maps], "Options"], list[Tensor]]
"""(streams, sublayers, options) -> every sublayer's input, and the last streams."""


class Options(NamedTuple):
    """What the forms are run with."""

    backend: str
    numerics: str
    norm: bool


def _separate(x: Tensor, sublayers: Sequence[Maps], options: Options, late: bool) -> list[Tensor]:
    inputs, weights = [], _first_read(x)
    for own in sublayers:
        pre, post, res = functional.coefficients(
            x, *own.learned, numerics=options.numerics, backend=options.backend
        )
        u = functional.read(x, weights if late else pre, options.backend)
        inputs.append(_normalised(u, own, options))
        x, weights = functional.write(x, own.y, post, res, options.backend), pre
    return [*inputs, x]


def _paired(x: Tensor, sublayers: Sequence[Maps], options: Options) -> list[Tensor]:
    inputs = []
    for own in sublayers:
        reading = functional.coefficients_and_read(
            x, *own.learned, numerics=options.numerics, backend=options.backend
        )
        inputs.append(_normalised(reading.u, own, options))
        x = functional.write(
            x, own.y, reading.post, reading.res, options.backend, link=reading.link
        )
    return [*inputs, x]


def _fused(x: Tensor, sublayers: Sequence[Maps], options: Options, late: bool) -> list[Tensor]:
    first, *others = sublayers
    choices: dict[str, Any] = {"numerics": options.numerics, "backend": options.backend}
    reading = functional.coefficients_and_read(x, *first.learned, **choices)
    u = functional.read(x, _first_read(x), options.backend) if late else reading.u
    inputs, before = [_normalised(u, first, options)], first
    for own in others:
        reading = functional.boundary(
            *(reading.x, before.y, reading.post, reading.res, *own.learned),
            pre=reading.pre if late else None,
            input_norm=InputNorm(own.weight, EPS) if options.norm else None,
            link=reading.link,
            **choices,
        )
        inputs.append(reading.u)
        before = own
    last = (reading.x, before.y, reading.post, reading.res, options.backend)
    return [*inputs, functional.write(*last, link=reading.link)]


FORMS: dict[str, Form] = {
    SEPARATE: partial(_separate, late=False),
    PAIRED: _paired,
    FUSED: partial(_fused, late=False),
    SINGLE: partial(_separate, late=True),
    SINGLE_FUSED: partial(_fused, late=True),
}


def _normalised(u: Tensor, own: Maps, options: Options) -> Tensor:
    if not options.norm:
        return u
    return torch.nn.functional.rms_norm(u, u.shape[-1:], own.weight.to(u.dtype), EPS)


def _first_read(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = torch.zeros(x.shape[-2], dtype=wide, device=x.device)
    weights[0] = 1
    return weights


def task(
    problem: Problem, backend: str, form: Form, norm: bool, like: Problem | None = None
) -> Task:
    """A run of DEPTH sublayers in one form; like: whose numbers it gets, in its own dtype."""
    options = Options(backend, problem.numerics, norm)
    given = [(like or problem).inputs(seed) for seed in range(DEPTH)]
    if like is not None:
        given = [Inputs(*(t.to(problem.torch_dtype) for t in inputs)) for inputs in given]
    ones = torch.ones(problem.channels, dtype=given[0].phi.dtype, device=problem.device)
    sublayers = [Maps(*map(leaf, (i.phi, i.alpha, i.bias, ones, i.y))) for i in given]
    x = leaf(given[0].x)
    used = [t for own in sublayers for t in own if norm or t is not own.weight]
    cotangents = (*(i.grad_u for i in given), given[0].grad_new)
    return Task(lambda: form(x, sublayers, options), (x, *used), cotangents)

"""`mhc verify`: every operator by every backend, and every installed peer, against float64."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_hc import constraints, functional, reference
from manifold_hc.bench import peers
from manifold_hc.bench.correctness import TOLERANCE, check, relative_error
from manifold_hc.bench.peers.implementations import quiet
from manifold_hc.bench.problem import DTYPES, Problem, reference_step
from manifold_hc.bench.task import Task, leaf
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Connection
from manifold_hc.errors import BackendError
from manifold_hc.kernels import backends
from manifold_hc.numerics import PRESETS, preset

SHAPES = ((33, 4, 64), (5, 3, 7), (2, 1, 16), (17, 5, 40), (9, 8, 24), (7, 2, 33), (3, 16, 8))
"""(tokens, streams, channels): the common one, and odd ones."""

WIDE = ("float64", "float32")
"""What coefficients may be."""


@dataclass
class Line:
    """One thing that was checked."""

    name: str
    backend: str
    dtype: str
    state: Literal["ok", "FAILED", "not served", "not installed"]
    error: float | None = None
    """Largest over shapes, outputs and gradients, as a share of the tensor's largest entry."""
    tolerance: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One operator: what it takes, what computes it, and what judges it."""

    name: str
    inputs: Callable[[int, int, int], list[tuple[Tensor, bool]]]
    """(tokens, n, C) -> tensors in float64, and whether each has the streams' dtype."""
    run: Callable[..., Any]
    """(*inputs, backend=) -> one tensor or several."""
    judge: Callable[..., Any]
    """(*inputs) -> the same in float64."""
    fits: Callable[[int], bool] = lambda n: True
    """Which n it exists for."""
    rounds: bool = False
    """Whether something inside is rounded to the streams' dtype before more is made of it."""
    wide: bool = False
    """Whether it takes no streams, so that narrow ones are no other case."""


def verify(device: str, say: Callable[[str], None]) -> Iterator[Line]:
    """One line a check, as they are done."""
    for backend in backends():
        for dtype in DTYPES:
            for case in cases():
                if case.wide and dtype not in WIDE:
                    continue
                say(f"{backend}, {dtype}: {case.name}")
                yield _line(case, backend, dtype, device)
    for dtype in ("float32", "bfloat16"):
        problem = Problem(tokens=64, channels=256, dtype=dtype, device=device)
        for peer in peers.for_problem(problem):
            say(f"{peer.package}, {dtype}")
            yield _peer_line(peer, problem)


def cases() -> list[Case]:
    """Every operator with every choice that changes its arithmetic."""
    found = [
        Case("read", _reading, functional.read, reference.read),
        Case("write", _writing, functional.write, reference.write),
        _rebuilding(),
        Case("collapse", _x, functional.collapse, reference.collapse),
        Case("collapse, weighted", _reading, functional.collapse, reference.collapse),
        Case(
            "hc_coefficients",
            _hc_parameters,
            functional.hc_coefficients,
            partial(reference.hc_coefficients, norm_eps=1e-20),
        ),
    ]
    for name, numerics in PRESETS.items():
        found += [
            Case(
                f"sinkhorn, {name}",
                lambda N, n, C: [(torch.randn(N, n, n).double(), False)],
                partial(functional.sinkhorn, numerics=name),
                partial(constraints.sinkhorn, iterations=20, numerics=numerics),
                wide=True,
            ),
            Case(
                f"exit_coefficients, {name}",
                partial(_parameters, rows=lambda n: n, gates=1),
                partial(functional.exit_coefficients, numerics=name),
                partial(reference.exit_coefficients, numerics=numerics),
            ),
            Case(
                f"connection, {name}",
                _connection_parameters,
                partial(_connection, numerics=name),
                lambda x, y, *rest, name=name: reference_step(x, y, *rest, numerics=name),
            ),
            *(_boundary_case(name, single_pass) for single_pass in (False, True)),
        ]
        found += [_coefficients(constraint, name) for constraint in constraints.CONSTRAINTS]
    return found


def _rebuilding() -> Case:
    def run(x: Tensor, y: Tensor, post: Tensor, res: Tensor, *, backend: str) -> Any:
        ((written,), inputs) = functional.rebuild(x, [(y, post, res)], [post, post], None, backend)
        return written, *inputs

    return Case("rebuild", _writing, run, partial(run, backend="reference"))


def _boundary_case(numerics: str, single_pass: bool) -> Case:
    return Case(
        f"{'single-pass ' * single_pass}boundary, {numerics}",
        _boundary_parameters,
        partial(_boundary, numerics=numerics, single_pass=single_pass),
        partial(_boundary, numerics=numerics, single_pass=single_pass, backend="reference"),
        rounds=True,
    )


def _coefficients(constraint: str, numerics: str) -> Case:
    table = constraints.CONSTRAINTS[constraint]
    return Case(
        f"coefficients, {constraint}, {numerics}",
        partial(_parameters, rows=lambda n: 2 * n + table.size(n), gates=3),
        partial(functional.coefficients, constraint=constraint, numerics=numerics),
        partial(
            reference.coefficients,
            iterations=20,
            constraint=constraint,
            numerics=preset(numerics),
        ),
        {
            "permutation": lambda n: n <= 5,
            "kronecker": lambda n: n & (n - 1) == 0,
        }.get(constraint, lambda n: True),
    )


def _line(case: Case, backend: str, dtype: str, device: str) -> Line:
    found = []
    for index, (tokens, n, channels) in enumerate(SHAPES):
        if not case.fits(n):
            continue
        torch.manual_seed(index)
        given = [(t.to(device), narrow) for t, narrow in case.inputs(tokens, n, channels)]
        try:
            found.append(_worst(case, given, backend, DTYPES[dtype]))
        except BackendError as why:
            return Line(case.name, backend, dtype, "not served", reason=str(why))
        except Exception as why:  # one operator that breaks must not hide the others
            reason = f"{type(why).__name__}: {why}"
            return Line(case.name, backend, dtype, "FAILED", reason=reason)
    error, tolerance = max(found, key=_share)
    state: Literal["ok", "FAILED"] = "ok" if error <= tolerance else "FAILED"
    return Line(case.name, backend, dtype, state, error, tolerance)


def _worst(
    case: Case, given: Sequence[tuple[Tensor, bool]], backend: str, dtype: torch.dtype
) -> tuple[float, float]:
    """(error, tolerance) of the tensor that uses most of its own: each is held to its dtype's.

    Coefficients and their gradients are float32 also where the streams are narrower.
    """
    wide = torch.promote_types(dtype, torch.float32)
    mine = [leaf(t.to(dtype if narrow else wide)) for t, narrow in given]
    judged = [leaf(t.double()) for t in mine]
    with torch.no_grad():
        cotangents = [torch.randn_like(o).to(dtype).double() for o in _tuple(case.judge(*judged))]
    wanted = Task(lambda: _tuple(case.judge(*judged)), tuple(judged), tuple(cotangents))
    found = Task(lambda: _tuple(case.run(*mine, backend=backend)), tuple(mine), tuple(cotangents))
    least = 3 * TOLERANCE[dtype] if case.rounds else 0.0
    return max(
        (
            (relative_error(a, b), max(least, TOLERANCE[a.dtype]))
            for a, b in zip(found.tensors(), wanted.tensors(), strict=True)
        ),
        key=_share,
    )


def _share(found: tuple[float, float]) -> float:
    return found[0] / found[1]


def _peer_line(peer: peers.Peer, problem: Problem) -> Line:
    name, dtype = f"peer {peer.package} {peer.version or ''}".strip(), problem.dtype
    try:
        with quiet():
            inputs = problem.inputs()
            candidate = peer.build(problem, inputs)
            verdict = check(candidate, inputs)
    except ImportError as why:
        return Line(name, "eager", dtype, "not installed", reason=str(why))
    except Exception as why:  # somebody else's code may fail in any way
        reason = f"{type(why).__name__}: {why}"
        return Line(name, "eager", dtype, "FAILED", reason=reason)
    state: Literal["ok", "FAILED"] = "ok" if verdict.ok else "FAILED"
    error, tolerance = verdict.error, verdict.tolerance
    return Line(name, "eager", dtype, state, error, tolerance, candidate.note)


def _x(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    return [(torch.randn(N, n, C).double(), True)]


def _reading(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    return [*_x(N, n, C), (torch.rand(N, n).double(), False)]


def _writing(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    y, post, res = torch.randn(N, C), 2 * torch.rand(N, n), torch.randn(N, n, n).softmax(-1)
    return [*_x(N, n, C), (y.double(), True), (post.double(), False), (res.double(), False)]


def _parameters(
    N: int, n: int, C: int, *, rows: Callable[[int], int], gates: int
) -> list[tuple[Tensor, bool]]:
    phi = torch.randn(rows(n), n * C) / (n * C) ** 0.5
    vectors = 1 + 0.1 * torch.randn(gates), 0.5 * torch.randn(rows(n))
    return [*_x(N, n, C), (phi.double(), False), *((v.double(), False) for v in vectors)]


def _hc_parameters(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    phi, alpha = torch.randn(2 + n, C) / C**0.5, 1 + 0.1 * torch.randn(3)
    bias = torch.randn(2 * n + n * n)
    return [*_x(N, n, C), *((t.double(), False) for t in (phi, alpha, bias))]


def _connection_parameters(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    x, *rest = _parameters(N, n, C, rows=lambda n: n * (n + 2), gates=3)
    return [x, (torch.randn(N, C).double(), True), *rest]


def _connection(
    x: Tensor, y: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, numerics: Any, backend: str
) -> tuple[Tensor, Tensor]:
    """The module as users have it, with these parameters: (u, x')."""
    config = ConnectionConfig(streams=x.shape[-2], numerics=numerics, backend=backend)
    connection = Connection(x.shape[-1], config).to(x.device)
    read: list[Tensor] = []

    def branch(u: Tensor) -> Tensor:
        read.append(u)
        return y

    values = {"maps.phi": phi, "maps.alpha": alpha, "maps.bias": bias}
    new: Tensor = torch.func.functional_call(connection, values, (x, branch))
    return read[0], new


def _boundary_parameters(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    x, y, *first = _connection_parameters(N, n, C)
    _, z, *second = _connection_parameters(N, n, C)
    weight = 1 + 0.5 * torch.rand(C)
    return [x, y, *first, z, *second, (weight.double(), False)]


def _boundary(*tensors: Tensor, numerics: str, single_pass: bool, backend: str) -> Any:
    """Two sublayers and what is between them: what the second reads, and the streams after it."""
    (x, y), first, (z,) = tensors[:2], tensors[2:5], tensors[5:6]
    second, weight = tensors[6:9], tensors[9]
    options = {"numerics": numerics, "backend": backend}
    before = functional.coefficients_and_read(x, *first, **options)  # type: ignore[arg-type]
    after = functional.boundary(
        *(x, y, before.post, before.res, *second),
        pre=before.pre if single_pass else None,
        input_norm=functional.InputNorm(weight, 1e-6),
        link=before.link,
        **options,  # type: ignore[arg-type]
    )
    written = functional.write(after.x, z, after.post, after.res, backend, link=after.link)
    return before.u, after.u, written


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)

"""The checks: each operator with random inputs, its float64 oracle, and its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifold_hc import constraints, functional, reference
from manifold_hc.bench.problem import reference_step
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Connection
from manifold_hc.numerics import PRESETS, preset


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

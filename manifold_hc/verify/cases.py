"""The checks: each operator with random inputs, its float64 oracle, and its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifold_hc import constraints, functional
from manifold_hc.bench.peers.implementations import without_branch
from manifold_hc.bench.problem import reference_step
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Branch, Connection
from manifold_hc.numerics import PRESETS, preset
from manifold_hc.reference import (
    coefficients,
    collapse,
    exit_coefficients,
    hc_coefficients,
    read,
    write,
)


@dataclass(frozen=True)
class Case:
    """One operator with one choice of its settings."""

    name: str
    inputs: Callable[[int, int, int], list[tuple[Tensor, bool]]]
    """(tokens, n, C) -> float64 tensors, each with true if it has the streams' dtype."""
    run: Callable[..., Any]
    """(*inputs, backend=) -> one tensor or several."""
    oracle: Callable[..., Any]
    """(*inputs) -> the exact results in float64."""
    fits: Callable[[int], bool] = lambda n: True
    """n -> true if the operator exists for n streams."""
    rounds: bool = False
    """True if an intermediate result is rounded, which triples the tolerance."""
    wide: bool = False
    """True if no input has the streams' dtype, so that narrow dtypes add no case."""


ARITHMETICS = ("paper", "deepseek_v4")
"""Presets with steps of their own; the others are deepseek_v4 with other epsilons or exits."""


def cases() -> list[Case]:
    """Return every operator with every setting that changes its arithmetic."""
    found = [
        Case("read", _read_inputs, functional.read, read),
        Case("write", _write_inputs, functional.write, write),
        _rebuild_case(),
        Case("collapse", _streams, functional.collapse, collapse),
        Case("collapse, weighted", _read_inputs, functional.collapse, collapse),
        Case(
            "hc_coefficients",
            _hc_inputs,
            functional.hc_coefficients,
            partial(hc_coefficients, norm_eps=1e-20),
        ),
    ]
    for name in ARITHMETICS:
        numerics = PRESETS[name]
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
                partial(_map_inputs, rows=lambda n: n, gates=1),
                partial(functional.exit_coefficients, numerics=name),
                partial(exit_coefficients, numerics=numerics),
            ),
            Case(
                f"connection, {name}",
                _connection_inputs,
                partial(_connection, numerics=name),
                lambda x, y, *rest, name=name: reference_step(x, y, *rest, numerics=name),
            ),
            *(_boundary_case(name, single_pass) for single_pass in (False, True)),
        ]
        found += [_coefficients_case(constraint, name) for constraint in constraints.CONSTRAINTS]
    return found


def _rebuild_case() -> Case:
    def run(x: Tensor, y: Tensor, post: Tensor, res: Tensor, *, backend: str) -> Any:
        ((written,), inputs) = functional.rebuild(x, [(y, post, res)], [post, post], None, backend)
        return written, *inputs

    return Case("rebuild", _write_inputs, run, partial(run, backend="reference"))


def _boundary_case(numerics: str, single_pass: bool) -> Case:
    return Case(
        f"{'single-pass ' * single_pass}boundary, {numerics}",
        _boundary_inputs,
        partial(_boundary, numerics=numerics, single_pass=single_pass),
        partial(_boundary, numerics=numerics, single_pass=single_pass, backend="reference"),
        rounds=True,
    )


def _coefficients_case(constraint: str, numerics: str) -> Case:
    table = constraints.CONSTRAINTS[constraint]
    return Case(
        f"coefficients, {constraint}, {numerics}",
        partial(_map_inputs, rows=lambda n: 2 * n + table.size(n), gates=3),
        partial(functional.coefficients, constraint=constraint, numerics=numerics),
        partial(
            coefficients,
            iterations=20,
            constraint=constraint,
            numerics=preset(numerics),
        ),
        lambda n: table.problem(n) is None,
    )


def _streams(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    return [(torch.randn(N, n, C).double(), True)]


def _read_inputs(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    return [*_streams(N, n, C), (torch.rand(N, n).double(), False)]


def _write_inputs(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    y, post, res = torch.randn(N, C), 2 * torch.rand(N, n), torch.randn(N, n, n).softmax(-1)
    return [*_streams(N, n, C), (y.double(), True), (post.double(), False), (res.double(), False)]


def _map_inputs(
    N: int, n: int, C: int, *, rows: Callable[[int], int], gates: int
) -> list[tuple[Tensor, bool]]:
    phi = torch.randn(rows(n), n * C) / (n * C) ** 0.5
    vectors = 1 + 0.1 * torch.randn(gates), 0.5 * torch.randn(rows(n))
    return [*_streams(N, n, C), (phi.double(), False), *((v.double(), False) for v in vectors)]


def _hc_inputs(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    phi, alpha = torch.randn(2 + n, C) / C**0.5, 1 + 0.1 * torch.randn(3)
    bias = torch.randn(2 * n + n * n)
    return [*_streams(N, n, C), *((t.double(), False) for t in (phi, alpha, bias))]


def _connection_inputs(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    x, *rest = _map_inputs(N, n, C, rows=lambda n: n * (n + 2), gates=3)
    return [x, (torch.randn(N, C).double(), True), *rest]


def _connection(
    x: Tensor, y: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, numerics: Any, backend: str
) -> tuple[Tensor, Tensor]:
    """(u, x') of a `Connection` with these parameters."""
    config = ConnectionConfig(streams=x.shape[-2], numerics=numerics, backend=backend)
    connection = Connection(x.shape[-1], config).to(x.device)
    values = {"maps.phi": phi, "maps.alpha": alpha, "maps.bias": bias}

    def connect(x: Tensor, branch: Branch) -> Tensor:
        return torch.func.functional_call(connection, values, (x, branch))

    return without_branch(connect)(x, y)


def _boundary_inputs(N: int, n: int, C: int) -> list[tuple[Tensor, bool]]:
    x, y, *first = _connection_inputs(N, n, C)
    _, z, *second = _connection_inputs(N, n, C)
    weight = 1 + 0.5 * torch.rand(C)
    return [x, y, *first, z, *second, (weight.double(), False)]


def _boundary(*tensors: Tensor, numerics: str, single_pass: bool, backend: str) -> Any:
    """Two sublayers with their boundary: the inputs of both, and the streams after the second."""
    x, y, *maps, weight = tensors
    first, z, second = maps[:3], maps[3], maps[4:]
    options: dict[str, Any] = {"numerics": numerics, "backend": backend}
    before = functional.coefficients_and_read(x, *first, **options)
    after = functional.boundary(
        x,
        y,
        before.post,
        before.res,
        *second,
        pre=before.pre if single_pass else None,
        input_norm=functional.InputNorm(weight, 1e-6),
        link=before.link,
        **options,
    )
    written = functional.write(after.x, z, after.post, after.res, backend, link=after.link)
    return before.u, after.u, written

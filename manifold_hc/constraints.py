"""Constraints on the mixing matrix `res`, and how it is made from a token's logits.

Every function maps logits with any leading shape to `res[..., o, i]`: row = output stream,
column = input stream. Gradients are exact: those of the finite iteration for `sinkhorn`,
the implicit ones for `exact`, plain autograd elsewhere.

A new constraint is a name in `ConstraintName`, a function, and a row of `CONSTRAINTS`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc.errors import ConfigError, ManifoldError
from manifold_hc.numerics import Numerics

ConstraintName = Literal[
    "sinkhorn", "sinkhorn_columns", "identity", "permutation", "kronecker", "exact", "none"
]

MOST_ITERATIONS = 1000
"""Most Sinkhorn-Knopp iterations: the backward keeps every iterate, and `exact` is their limit."""

MOST_PERMUTED = 5
"""Largest n of `permutation`, which has n! logits a token."""

OFF_DIAGONAL = -5.0
"""Initial logit of all entries off the identity: near it, yet not saturated."""


def sinkhorn(
    logits: Float[Tensor, "*batch n n"], iterations: int, numerics: Numerics
) -> Float[Tensor, "*batch n n"]:
    """Sinkhorn-Knopp projection towards the doubly stochastic matrices, `iterations` times.

    Takes `res` logits [o, i] with "paper" numerics and `comb` logits [source, target] with
    "deepseek_v4"; returns `res[o, i]` with both. arXiv 2512.24880, section 4.2; arXiv 2606.19348.
    """
    # Tokens last: every step then runs over long rows of memory, four times faster on a CPU.
    matrix = logits.movedim((-2, -1), (0, 1)).contiguous()
    step = _sinkhorn_deepseek_v4 if numerics.res_is_transposed else _sinkhorn_paper
    return step(matrix, iterations, numerics).movedim((0, 1), (-2, -1)).contiguous()


def sinkhorn_columns(
    logits: Float[Tensor, "*batch n n"], iterations: int, numerics: Numerics
) -> Float[Tensor, "*batch n n"]:
    """Sinkhorn-Knopp in the other order: rows of `res` first, columns last.

    Column sums are then exact and the truncation error is in the row sums, so the forward gain is
    not 1. Megatron-LM's main branch and Liger-Kernel compute this one. Equals the transpose of
    `sinkhorn` on transposed logits; the logits are laid out as there.
    """
    return sinkhorn(logits.mT, iterations, numerics).mT.contiguous()


def _sinkhorn_paper(
    logits: Float[Tensor, "o i *batch"], iterations: int, numerics: Numerics
) -> Float[Tensor, "o i *batch"]:
    """`M_t = rows(columns(M_{t-1}))` in logarithms, so that no row or column underflows to 0/0."""
    for _ in range(iterations):
        logits = logits.log_softmax(0).log_softmax(1)
    return logits.exp()


def _sinkhorn_deepseek_v4(
    logits: Float[Tensor, "source target *batch"], iterations: int, numerics: Numerics
) -> Float[Tensor, "target source *batch"]:
    """Softmax over comb's rows first, its columns last; `hc_eps` in every denominator.

    res = comb^T, so the rows of res come last and are exact, up to `hc_eps`.
    """
    eps = numerics.hc_eps
    comb = logits.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb.transpose(0, 1)


def identity(n: int, like: Tensor) -> Float[Tensor, "*batch n n"]:
    """`res = I` for every token of `like` [*batch, k] (iHC)."""
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return eye.expand(*like.shape[:-1], n, n)


def permutation(logits: Float[Tensor, "*batch k"], n: int) -> Float[Tensor, "*batch n n"]:
    """Convex combination of all n! permutations, in lexicographic order (arXiv 2601.05732).

    `P_k[o, perm_k[o]] = 1`; k = n!.
    """
    order = torch.tensor(list(itertools.permutations(range(n))), device=logits.device)
    matrices = torch.nn.functional.one_hot(order, n).to(logits.dtype)
    return (logits.softmax(-1) @ matrices.flatten(1)).unflatten(-1, (n, n))


def kronecker(logits: Float[Tensor, "*batch k"], n: int) -> Float[Tensor, "*batch n n"]:
    """Kronecker product of log2(n) doubly stochastic 2x2 factors (arXiv 2601.21579).

    Each factor is softmax(keep, swap) of its two logits; the first factor acts on the most
    significant bit of the stream index; k = 2 log2(n). The result is always symmetric.
    """
    res = logits.new_ones(*logits.shape[:-1], 1, 1)
    for keep, swap in (pair.unbind(-1) for pair in _pairs(logits)):
        factor = torch.stack([keep, swap, swap, keep], -1).unflatten(-1, (2, 2))
        product = torch.einsum("...ab,...cd->...acbd", res, factor)
        res = product.flatten(-2).flatten(-3, -2)
    return res


def _pairs(logits: Float[Tensor, "*batch k"]) -> tuple[Tensor, ...]:
    """The softmax over (keep, swap) of each 2x2 factor."""
    count = logits.shape[-1] // 2
    return logits.unflatten(-1, (count, 2)).softmax(-1).unbind(-2) if count else ()


def exact(logits: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The one matrix `D1 exp(logits) D2` whose rows and columns all sum to 1.

    Newton's method on the dual in float64, with the implicit gradient (arXiv 2606.07574). It is the
    limit of `sinkhorn`, and measures its truncation error. Raises ManifoldError when the logits
    span so much that float64 holds no such matrix.
    """
    result: Tensor = _Exact.apply(logits.double())
    return result.to(logits.dtype)


class _Exact(torch.autograd.Function):
    """Implicit differentiation; the backward is itself differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return _doubly_stochastic(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Projects `res * grad` onto the matrices whose rows and columns sum to 0."""
        (res,) = ctx.saved_tensors
        rows, columns = (res * grad).sum(-1, keepdim=True), (res * grad).sum(-2).unsqueeze(-1)
        a = torch.linalg.solve(_dual_hessian(res), rows - res @ columns)
        b = columns - res.mT @ a
        return res * (grad - a - b.mT)


def _dual_hessian(res: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Hessian of the dual in the row potentials, regular along its constant direction.

    It is a graph Laplacian. Summing its diagonal from the off-diagonal entries keeps the digits
    that `rowsum - res res^T` would cancel when `res` is close to a permutation.
    """
    n = res.shape[-1]
    eye = torch.eye(n, dtype=res.dtype, device=res.device)
    weights = (res @ res.mT) * (1 - eye)
    degree = weights.sum(-1)
    scale = degree.mean(-1)[..., None, None].clamp_min(1e-280)
    return degree.diag_embed() - weights + scale * (1.0 / n + torch.finfo(res.dtype).eps * eye)


def _doubly_stochastic(logits: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Newton on the row potentials; columns are normalised exactly at every step."""
    longest = logits.new_tensor([1e3, 32.0, 8.0, 2.0, 0.5, 0.1]).view(-1, *[1] * (logits.dim() - 1))
    tolerance = 8 * logits.shape[-1] * torch.finfo(logits.dtype).eps

    def log_matrix(potential: Tensor) -> Tensor:
        return (logits + potential.unsqueeze(-1)).log_softmax(-2)

    potential = logits.new_zeros(logits.shape[:-1])
    for _ in range(200):
        current = log_matrix(potential)
        res = current.exp()
        error = res.sum(-1) - 1
        if error.numel() == 0 or error.abs().max() <= tolerance:
            break
        newton = torch.linalg.solve_ex(_dual_hessian(res), -error.unsqueeze(-1))[0].squeeze(-1)
        # Far from the solution Newton overshoots, without bound where `res` is nearly a
        # permutation: of several lengths the best is taken. A Sinkhorn step always helps a little.
        length = newton.abs().amax(-1, keepdim=True)
        moves = torch.cat(
            [newton * (longest / length).clamp_max(1), -current.logsumexp(-1).unsqueeze(0)]
        )
        trials = log_matrix(potential + moves).exp().sum(-1) - 1
        best = trials.abs().sum(-1).nan_to_num(nan=torch.inf).argmin(0)
        index = best[None, ..., None].expand(1, *potential.shape)
        potential = potential + moves.gather(0, index).squeeze(0)
    # A NaN comes out as NaN, as everywhere else: it fails this comparison too.
    if error.numel() and (worst := float(error.abs().max())) > 1e-9:
        span = float(logits.max() - logits.min())
        raise ManifoldError(
            f"exact: wanted row sums within 1e-9 of 1, got {worst:.1e} off after 200 Newton steps "
            f'on logits that span {span:.0f}; use constraint="sinkhorn"'
        )
    return res


@dataclass(frozen=True)
class Constraint:
    """One row of the table: number, initial values and meaning of a token's logits."""

    size: Callable[[int], int]
    """n -> number k of logits a token."""
    initial: Callable[[int], list[float]]
    """n -> their k initial biases, at or near the identity."""
    build: Callable[[Tensor, int, int, Numerics], Tensor]
    """(logits [*batch, k], n, iterations, numerics) -> res [*batch, o, i]."""
    rows_sum_to_one: bool = True
    """True if every row of res sums to 1, so that mixing equal streams changes nothing."""
    in_kernels: bool = False
    """True if the compiled kernels compute res themselves; torch builds the others."""
    problem: Callable[[int], str | None] = lambda n: None
    """n -> why the constraint does not exist for n streams; None if it does."""


def _matrix(logits: Tensor, n: int) -> Tensor:
    return logits.unflatten(-1, (n, n))


def _oriented(res: Tensor, numerics: Numerics) -> Tensor:
    return res.mT if numerics.res_is_transposed else res


def _near_identity(n: int) -> list[float]:
    return [0.0 if i == o else OFF_DIAGONAL for o in range(n) for i in range(n)]


def _first_of(size: int) -> list[float]:
    return [0.0] + [OFF_DIAGONAL] * (size - 1)


CONSTRAINTS: dict[str, Constraint] = {
    "sinkhorn": Constraint(
        size=lambda n: n * n,
        initial=_near_identity,
        build=lambda logits, n, iterations, numerics: sinkhorn(
            _matrix(logits, n), iterations, numerics
        ),
        in_kernels=True,
    ),
    "sinkhorn_columns": Constraint(
        size=lambda n: n * n,
        initial=_near_identity,
        build=lambda logits, n, iterations, numerics: sinkhorn_columns(
            _matrix(logits, n), iterations, numerics
        ),
        rows_sum_to_one=False,
    ),
    "identity": Constraint(
        size=lambda n: 0,
        initial=lambda n: [],
        build=lambda logits, n, iterations, numerics: identity(n, logits),
        in_kernels=True,
    ),
    "permutation": Constraint(
        size=math.factorial,
        initial=lambda n: _first_of(math.factorial(n)),
        build=lambda logits, n, iterations, numerics: permutation(logits, n),
        problem=lambda n: (
            f"has n! logits and takes n <= {MOST_PERMUTED} but n is {n}"
            if n > MOST_PERMUTED
            else None
        ),
    ),
    "kronecker": Constraint(
        size=lambda n: 2 * (n.bit_length() - 1),
        initial=lambda n: _first_of(2) * (n.bit_length() - 1),
        build=lambda logits, n, iterations, numerics: kronecker(logits, n),
        problem=lambda n: f"takes n a power of two but n is {n}" if n & (n - 1) else None,
    ),
    "exact": Constraint(
        size=lambda n: n * n,
        initial=_near_identity,
        build=lambda logits, n, iterations, numerics: _oriented(
            exact(_matrix(logits, n)), numerics
        ),
    ),
    "none": Constraint(
        size=lambda n: n * n,
        initial=lambda n: [float(i == o) for o in range(n) for i in range(n)],
        build=lambda logits, n, iterations, numerics: _oriented(_matrix(logits, n), numerics),
        rows_sum_to_one=False,
        in_kernels=True,
    ),
}


def constraint(name: str, n: int) -> Constraint:
    """Return the constraint `name`; raise ConfigError if it does not exist for n streams."""
    if name not in CONSTRAINTS:
        raise ConfigError(f"constraint: must be one of {', '.join(CONSTRAINTS)} but is {name!r}")
    row = CONSTRAINTS[name]
    if problem := row.problem(n):
        raise ConfigError(f"constraint: {name} {problem}")
    return row

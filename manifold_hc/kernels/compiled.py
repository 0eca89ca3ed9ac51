"""A compiled backend's operators under the reference's signatures.

Flattens the tokens, makes what broadcasts whole, and leaves to torch what costs nothing: gates and
activations of the projections, and the constraints that no kernel is worth.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from manifold_hc import reference
from manifold_hc.constraints import CONSTRAINTS
from manifold_hc.kernels.operators import FUSED_CONSTRAINTS, Settings
from manifold_hc.numerics import Numerics
from manifold_hc.reference import Coefficients


class Compiled:
    """The operators of `torch.ops.manifold_hc.<backend>_*`; shapes as in `reference`."""

    def __init__(self, backend: str) -> None:
        """`backend`: a name that `operators.register` has seen."""
        self.backend = backend

    def table(self) -> dict[tuple[str, str], Callable[..., Any]]:
        """Its rows of `OPERATORS`."""
        operators = (
            self.sinkhorn,
            self.coefficients,
            self.coefficients_and_read,
            self.boundary,
            self.hc_coefficients,
            self.exit_coefficients,
            self.read,
            self.write,
            self.collapse,
            self.rebuild,
        )
        return {(operator.__name__, self.backend): operator for operator in operators}

    def _operator(self, name: str) -> Any:
        return getattr(torch.ops.manifold_hc, f"{self.backend}_{name}")

    def sinkhorn(self, logits: Tensor, iterations: int, numerics: Numerics) -> Tensor:
        """See `constraints.sinkhorn`."""
        n = logits.shape[-1]
        flat = logits.reshape(-1, n, n)
        run = self._operator("sinkhorn")
        res: Tensor = run(flat, iterations, numerics.res_is_transposed, numerics.hc_eps)
        return res.view(logits.shape)

    def _project(self, x: Tensor, phi: Tensor, norm_eps: float) -> Tensor:
        v = x.reshape(prod(x.shape[:-2]), phi.shape[-1])
        projected: Tensor = self._operator("project")(v, phi, norm_eps)[0]
        return projected.view(*x.shape[:-2], phi.shape[0])

    def coefficients(
        self,
        x: Tensor,
        phi: Tensor | None,
        alpha: Tensor | None,
        bias: Tensor,
        iterations: int,
        constraint: str,
        numerics: Numerics,
    ) -> Coefficients:
        """See `reference.coefficients`."""
        n, batch = x.shape[-2], x.shape[:-2]
        if phi is None or alpha is None:
            # The same for every token: made once, then repeated.
            made = self._activate(bias, n, iterations, constraint, numerics)
            pre, post, res = (each.expand(*batch, *each.shape) for each in made)
            return pre, post, res
        if constraint in FUSED_CONSTRAINTS:
            settings = _settings(iterations, constraint, numerics, learns=True)
            streams = x.reshape(prod(batch), n, x.shape[-1])
            operator = self._operator("coefficients")
            pre, post, res, _, _ = operator(streams, phi, alpha, bias, *settings)
            pre, post, res = _batched(list(batch), pre, post, res)
            return pre, post, res
        logits = reference.gate(self._project(x, phi, numerics.norm_eps), alpha, bias, n)
        return self._activate(logits, n, iterations, constraint, numerics)

    def _activate(
        self, logits: Tensor, n: int, iterations: int, constraint: str, numerics: Numerics
    ) -> Coefficients:
        pre, post, res = reference.activate(logits, n, numerics)
        if constraint == "sinkhorn":
            return pre, post, self.sinkhorn(res.unflatten(-1, (n, n)), iterations, numerics)
        return pre, post, CONSTRAINTS[constraint].build(res, n, iterations, numerics)

    def coefficients_and_read(
        self,
        x: Tensor,
        phi: Tensor | None,
        alpha: Tensor | None,
        bias: Tensor,
        iterations: int,
        constraint: str,
        numerics: Numerics,
        learns: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(pre, post, res, u, link); one pass where the maps are dynamic and a kernel makes res.

        Without `learns` what comes through the link is no gradient of res.
        """
        if phi is None or alpha is None or constraint not in FUSED_CONSTRAINTS:
            maps = self.coefficients(x, phi, alpha, bias, iterations, constraint, numerics)
            return *maps, self.read(x, maps[0]), None
        (*batch, n, C) = x.shape
        settings = _settings(iterations, constraint, numerics, learns)
        u, pre, post, res, _, _, link = self._operator("coefficients_and_read")(
            x.reshape(prod(batch), n, C), phi, alpha, bias, *settings
        )
        pre, post, res, u = _batched(batch, pre, post, res, u)
        return pre, post, res, u, link

    def boundary(
        self,
        x: Tensor,
        y: Tensor,
        post: Tensor,
        res: Tensor,
        pre: Tensor | None,
        phi: Tensor | None,
        alpha: Tensor | None,
        bias: Tensor,
        weight: Tensor | None,
        input_eps: float,
        iterations: int,
        constraint: str,
        numerics: Numerics,
        learns: bool = True,
        link: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(x', pre', post', res', u', link'); one pass, or `write` and what follows it."""
        maps = (iterations, constraint, numerics)
        if phi is None or alpha is None or constraint not in FUSED_CONSTRAINTS:
            x = self.write(x, y, post, res, link)
            new_pre, new_post, new_res = self.coefficients(x, phi, alpha, bias, *maps)
            u = self.read(x, new_pre if pre is None else pre)
            u = u if weight is None else reference.normalise(u, weight, input_eps)
            return x, new_pre, new_post, new_res, u, None
        (*batch, n, C) = x.shape
        tokens = prod(batch)
        written, u, new_pre, new_post, new_res, _, _, new_link = self._operator("boundary")(
            x.reshape(tokens, n, C),
            y.reshape(tokens, C),
            post.expand(*batch, n).reshape(tokens, n),
            res.expand(*batch, n, n).reshape(tokens, n, n),
            None if pre is None else pre.expand(*batch, n).reshape(tokens, n),
            *(link, phi, alpha, bias, weight, input_eps),
            *_settings(iterations, constraint, numerics, learns),
        )
        new_pre, new_post, new_res, u = _batched(batch, new_pre, new_post, new_res, u)
        return written.view(x.shape), new_pre, new_post, new_res, u, new_link

    def hc_coefficients(
        self,
        x: Tensor,
        phi: Tensor | None,
        alpha: Tensor | None,
        bias: Tensor,
        norm_eps: float,
    ) -> Coefficients:
        """See `reference.hc_coefficients`."""
        static = bias.expand(*x.shape[:-2], -1)
        if phi is None or alpha is None:
            return reference.hc_move(static, x.shape[-2])
        projected = self._project(x.unsqueeze(-2), phi, norm_eps)
        return reference.hc_move(static, x.shape[-2], projected, alpha)

    def exit_coefficients(
        self, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, numerics: Numerics
    ) -> Tensor:
        """See `reference.exit_coefficients`."""
        logits = self._project(x, phi, numerics.norm_eps) * alpha + bias
        return logits.sigmoid() + numerics.hc_eps

    def read(self, x: Tensor, pre: Tensor) -> Tensor:
        """See `reference.read`."""
        (*batch, n, C) = x.shape
        tokens = prod(batch)
        weights = pre.expand(*batch, n).reshape(tokens, n)
        u: Tensor = self._operator("read")(x.reshape(tokens, n, C), weights)
        return u.view(*batch, C)

    def write(
        self, x: Tensor, y: Tensor, post: Tensor, res: Tensor, link: Tensor | None = None
    ) -> Tensor:
        """See `reference.write`; `link` as `coefficients_and_read` made it."""
        (*batch, n, C) = x.shape
        tokens = prod(batch)
        out: Tensor = self._operator("write")(
            x.reshape(tokens, n, C),
            y.reshape(tokens, C),
            post.expand(*batch, n).reshape(tokens, n),
            res.expand(*batch, n, n).reshape(tokens, n, n),
            link,
        )
        return out.view(x.shape)

    def collapse(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """See `reference.collapse`."""
        return reference.collapse(x, None) if weights is None else self.read(x, weights)

    def rebuild(
        self,
        x: Tensor,
        writes: Sequence[tuple[Tensor, Tensor, Tensor]],
        reads: Sequence[Tensor],
        norms: Sequence[tuple[Tensor | None, float]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `reference.rebuild`; one pass, which autograd does not see."""
        (*batch, n, C) = x.shape
        tokens = prod(batch)

        def flat(weights: Tensor, *own: int) -> Tensor:
            return weights.expand(*batch, *own).reshape(tokens, *own)

        # The kernel takes one dtype; a wider one holds the same numbers.
        dtypes = [y.dtype for y, _, _ in writes] or [x.dtype]
        dtype = reduce(torch.promote_types, dtypes)
        streams, inputs = self._operator("rebuild")(
            x.reshape(tokens, n, C),
            [y.to(dtype).reshape(tokens, C) for y, _, _ in writes],
            [flat(post, n) for _, post, _ in writes],
            [flat(res, n, n) for _, _, res in writes],
            [flat(pre, n) for pre in reads],
            [weight for weight, _ in norms],
            [eps for _, eps in norms],
        )
        return [s.view(x.shape) for s in streams], [u.view(*batch, C) for u in inputs]


def _settings(iterations: int, constraint: str, numerics: Numerics, learns: bool) -> Settings:
    epsilons = (numerics.norm_eps, numerics.hc_eps)
    return Settings(constraint, iterations, numerics.res_is_transposed, *epsilons, learns)


def _batched(batch: list[int], *flat: Tensor) -> tuple[Tensor, ...]:
    """The tokens' own shape again."""
    return tuple(tensor.view(*batch, *tensor.shape[1:]) for tensor in flat)

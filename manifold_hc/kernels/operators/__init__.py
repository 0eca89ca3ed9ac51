"""Operators of a compiled backend, one file each: call, schema, fake, kernel, derivatives."""

from torch import Tensor

from manifold_hc import reference
from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.operators.boundary import Boundary
from manifold_hc.kernels.operators.coefficients import Coefficients, CoefficientsAndRead
from manifold_hc.kernels.operators.project import Project
from manifold_hc.kernels.operators.read import Read
from manifold_hc.kernels.operators.rebuild import Rebuild
from manifold_hc.kernels.operators.sinkhorn import Sinkhorn
from manifold_hc.kernels.operators.write import Write
from manifold_hc.numerics import Numerics


class Operators:
    """Operators of one backend, and two functions that torch completes from projections."""

    def __init__(self, backend: str, support: Support) -> None:
        """Define `torch.ops.manifold_hc.<backend>_*`, once in a process.

        `support`: devices, numbers of streams and dtypes that the backend's kernels take.
        """
        self.backend = backend
        self.sinkhorn = Sinkhorn(backend, support)
        self.project = Project(backend, support)
        self.read = Read(backend, support)
        self.write = Write(backend, support)
        self.coefficients_and_read = CoefficientsAndRead(backend, support)
        self.coefficients = Coefficients(backend, support, self.coefficients_and_read.backward_op)
        self.boundary = Boundary(backend, support, self.write.backward_op)
        self.rebuild = Rebuild(backend, support)

    def hc_coefficients(
        self,
        x: Tensor,
        phi: Tensor | None,
        alpha: Tensor | None,
        bias: Tensor,
        norm_eps: float,
    ) -> reference.Coefficients:
        """Compute `reference.hc_coefficients`, its projections by the kernel."""
        static = bias.expand(*x.shape[:-2], -1)
        if phi is None or alpha is None:
            return reference.hc_move(static, x.shape[-2])
        projected = self.project(x.unsqueeze(-2), phi, norm_eps)
        return reference.hc_move(static, x.shape[-2], projected, alpha)

    def exit_coefficients(
        self, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, numerics: Numerics
    ) -> Tensor:
        """Compute `reference.exit_coefficients`, its projections by the kernel."""
        logits = self.project(x, phi, numerics.norm_eps) * alpha + bias
        return logits.sigmoid() + numerics.hc_eps

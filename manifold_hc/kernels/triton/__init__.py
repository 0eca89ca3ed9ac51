"""The Triton backend: fused forward and backward kernels for CUDA and ROCm devices.

The functions are those of `manifold_hc.kernels.operators.Kernels`. Nothing else imports triton.
Under `TRITON_INTERPRET=1`, set before triton's first import, they run on CPU tensors too. Where one
number decides on a whole mask, it is tl.where: Triton 3.9's interpreter makes integers of `&`.
"""

from manifold_hc.kernels.triton.boundary import boundary
from manifold_hc.kernels.triton.coefficients import coefficients, coefficients_and_read
from manifold_hc.kernels.triton.coefficients_backward import (
    boundary_backward,
    coefficients_and_read_backward,
)
from manifold_hc.kernels.triton.project import project, project_backward
from manifold_hc.kernels.triton.read import read, read_backward
from manifold_hc.kernels.triton.rebuild import rebuild
from manifold_hc.kernels.triton.sinkhorn import sinkhorn, sinkhorn_backward
from manifold_hc.kernels.triton.write import branch_backward, write, write_backward

__all__ = [
    "boundary",
    "boundary_backward",
    "branch_backward",
    "coefficients",
    "coefficients_and_read",
    "coefficients_and_read_backward",
    "project",
    "project_backward",
    "read",
    "read_backward",
    "rebuild",
    "sinkhorn",
    "sinkhorn_backward",
    "write",
    "write_backward",
]

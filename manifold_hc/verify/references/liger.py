"""Liger-Kernel's three mHC operators in float32, interpreted.

A GPU would multiply in TF32, whose error of 1e-3 hides most differences.
"""

from typing import Any

import torch
from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import MissingExtraError
from manifold_hc.numerics import preset
from manifold_hc.verify.references.implementation import Implementation, Tensors


def build(config: ConnectionConfig, channels: int) -> Implementation:
    """Return its connections; its users choose the exit.

    For a process whose Triton interprets its kernels, see `Library.run`.
    """
    functional = _functional()
    numerics = preset(config.numerics, norm_eps=config.norm_eps, hc_eps=config.hc_eps)

    def sublayer(index: int, tensors: Tensors, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        own = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
        pre, post, res = functional.liger_mhc_coeffs(
            x,
            own["phi"],
            own["b"],
            *(own[name].reshape(()) for name in ("alpha_pre", "alpha_post", "alpha_res")),
            allow_fp32=True,
            tmax=config.iterations,
            rms_eps=numerics.norm_eps,
            pre_eps=numerics.hc_eps,
            sinkhorn_eps=numerics.hc_eps,
        )
        return {
            "pre": pre,
            "post": post,
            "res": res,
            "u": functional.liger_mhc_pre(x, pre),
            "new": functional.liger_mhc_post_res(x, y, post, res),
        }

    return Implementation(sublayer, None)


def _functional() -> Any:
    try:
        from liger_kernel.transformers import functional
    except ImportError as error:
        raise MissingExtraError(
            f"mhc verify --checkpoint of Liger-Kernel's layout needs liger-kernel and triton "
            f"({error}); install with: pip install --no-deps liger-kernel triton"
        ) from None
    return functional

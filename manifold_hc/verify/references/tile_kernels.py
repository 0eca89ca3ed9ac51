"""DeepSeek's TileKernels: its reference in torch, `tile_kernels/torch/mhc.py`.

The package imports a GPU compiler; the file with the reference needs torch alone and is loaded by
its path.
"""

from functools import cache
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import MissingExtraError
from manifold_hc.numerics import preset
from manifold_hc.verify.references.implementation import Implementation, Tensors
from manifold_hc.verify.widened import Widened

FILE = "tile_kernels/torch/mhc.py"


def build(config: ConnectionConfig, channels: int) -> Implementation:
    """Return its connections and its head, computed in float64."""
    code, n = _code(), config.n
    numerics = preset(config.numerics, norm_eps=config.norm_eps, hc_eps=config.hc_eps)

    def project(x: Tensor, tensors: Tensors) -> Tensor:
        weight = tensors.get("norm_weight")
        return code.mhc_pre_norm_fn_ref(x, tensors["fn"], weight, numerics.norm_eps)

    def sublayer(index: int, tensors: Tensors, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
        with Widened():
            pre, post, logits = code.mhc_pre_split_mixes_ref(
                project(x, tensors), tensors["scale"], tensors["base"], n, 2.0, numerics.hc_eps
            )
            comb = code.sinkhorn_normalize_ref(logits, config.iterations, numerics.hc_eps)
            results = {
                "pre": pre[..., 0],
                "post": post[..., 0],
                "u": code.mhc_pre_apply_mix_ref(x, pre),
                "new": code.mhc_post_ref(y, x, post, comb),
            }
        return {name: value.squeeze(0) for name, value in results.items()}

    def exit(tensors: Tensors, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        with Widened():
            weights = code.mhc_head_compute_mix_ref(
                project(x, tensors), tensors["scale"], tensors["base"], numerics.hc_eps
            )
            h: Tensor = code.mhc_pre_apply_mix_ref(x, weights.unsqueeze(-1))
        return h.squeeze(0)

    return Implementation(sublayer, exit if config.exit_rule == "learned" else None)


@cache
def _code() -> Any:
    try:
        path = metadata.distribution("tile-kernels").locate_file(FILE)
    except metadata.PackageNotFoundError:
        raise MissingExtraError(
            "mhc verify --checkpoint of TileKernels' layout needs tile-kernels; install its "
            "reference with: pip install --no-deps tile-kernels"
        ) from None
    spec = spec_from_file_location("manifold_hc_tile_kernels_reference", str(path))
    if spec is None or spec.loader is None:
        raise MissingExtraError(
            f"tile-kernels: must have the file {FILE} but has none; install tile-kernels 1.0.0"
        )
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

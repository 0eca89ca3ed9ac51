"""Connections of transformers' modules by our operators: read, boundary and write of a sublayer.

`fn`, `scale` and `base` of a module are our phi, alpha and bias, with "deepseek_v4" numerics. Its
`comb[source, target]` is `res` transposed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manifold_hc import functional
from manifold_hc.functional import BackwardLink, Reading
from manifold_hc.known_forwards import is_altered


class Maps(NamedTuple):
    """Map parameters of one module and the options of its equations."""

    phi: Tensor
    """[R, nC]"""
    alpha: Tensor
    """[3]"""
    bias: Tensor
    """[R]"""
    options: dict[str, Any]
    """Keywords of `functional.coefficients`."""
    post_factor: float = 1.0
    """Factor of post, on top of the numerics' own 2."""
    post_eps: float = 0.0
    """Epsilon added to post."""


class Sublayer(NamedTuple):
    """One sublayer between its read and its write; `write` uses every field but u."""

    x: Tensor
    """Streams [B, T, n, C]."""
    u: Tensor
    """Input of the branch [B, T, C]."""
    post: Tensor
    res: Tensor
    link: BackwardLink | None
    """None if the module itself computed the coefficients."""
    backend: str


def mhc_maps(module: Any) -> Maps:
    """Return the maps of a DeepSeek-V4 connection (arXiv 2606.19348): `fn`, `scale`, `base`."""
    options = {
        "iterations": module.hc_sinkhorn_iters,
        "numerics": "deepseek_v4",
        "norm_eps": module.input_norm.eps,
        "hc_eps": module.hc_eps,
    }
    return Maps(wide(module.fn), wide(module.scale), wide(module.base), options)


def identity_maps(module: Any) -> Maps:
    """Return the maps of an hy_v4 connection, whose res is the identity.

    It scales post by `hc_post_magnitude` and adds the epsilon to it. Its `scale` has no entry for
    res; no row uses the third one.
    """
    options = {
        "constraint": "identity",
        "numerics": "deepseek_v4",
        "norm_eps": module.input_norm.eps,
        "hc_eps": module.hc_eps,
        "learn_res": False,
    }
    scale = wide(module.scale)
    alpha = torch.cat([scale, scale.new_zeros(1)])
    factor = module.hc_post_magnitude / 2
    return Maps(wide(module.fn), alpha, wide(module.base), options, factor, module.hc_eps)


def head_maps(module: Any) -> Maps:
    """Return the maps of a learned exit, whose weights are the pre of a sublayer without a write.

    One operator then computes weights and sum, and one their gradients. The rows of post are zeros.
    """
    fn, base = wide(module.hc_fn), wide(module.hc_base)
    options = {
        "constraint": "identity",
        "numerics": "deepseek_v4",
        "norm_eps": module.input_norm.eps,
        "hc_eps": module.eps,
        "learn_res": False,
    }
    scale = wide(module.hc_scale)
    phi = torch.cat([fn, torch.zeros_like(fn)])
    alpha = torch.cat([scale, scale.new_zeros(2)])
    return Maps(phi, alpha, torch.cat([base, torch.zeros_like(base)]), options)


def read(module: nn.Module, x: Tensor, backend: str) -> Sublayer:
    """Compute the coefficients of the streams x and the input of the branch."""
    if is_direct(module):
        return read_directly(module, x, backend)
    post, *comb, u = module(x)
    post = wide(post)
    # A connection without comb leaves the streams unmixed.
    res = wide(comb[0]).mT if comb else torch.eye(x.shape[-2], dtype=post.dtype, device=x.device)
    return Sublayer(x, u, post, res, None, backend)


def read_directly(module: Any, x: Tensor, backend: str) -> Sublayer:
    """Compute `read` from the parameters of the module, without calling it."""
    maps: Maps = module.mhc_maps()
    reading = functional.coefficients_and_read(
        x, maps.phi, maps.alpha, maps.bias, backend=backend, **maps.options
    )
    return _opened(reading, maps, backend)


def boundary(before: Sublayer, y: Tensor, module: Any) -> Sublayer:
    """Write the branch output y of one sublayer and read the next, in one operator if possible."""
    if not is_direct(module):
        return read(module, write(before, y), before.backend)
    maps: Maps = module.mhc_maps()
    reading = functional.boundary(
        before.x,
        y,
        before.post,
        before.res,
        maps.phi,
        maps.alpha,
        maps.bias,
        link=before.link,
        backend=before.backend,
        **maps.options,
    )
    return _opened(reading, maps, before.backend)


def write(sublayer: Sublayer, y: Tensor) -> Tensor:
    """Return the next streams [B, T, n, C]."""
    x, _, post, res, link, backend = sublayer
    return functional.write(x, y, post, res, backend, link=link)


def is_direct(module: nn.Module) -> bool:
    """True if our operators may take this connection's parameters past its call.

    A connection with hooks, with another forward, or wrapped by another module is called instead.
    """
    return hasattr(type(module), "mhc_maps") and not is_altered(module)


def wide(parameter: Tensor) -> Tensor:
    """Return the parameter in float32, as transformers computes with it, or in float64."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def _opened(reading: Reading, maps: Maps, backend: str) -> Sublayer:
    post = reading.post
    if maps.post_factor != 1.0 or maps.post_eps:
        post = maps.post_factor * post + maps.post_eps
    return Sublayer(reading.x, reading.u, post, reading.res, reading.link, backend)

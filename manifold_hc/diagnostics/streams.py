"""Diversity of the streams: cosine similarity and effective rank."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def pairwise_cosine(x: Float[Tensor, "*batch n C"]) -> float:
    """Compute the mean cosine similarity between two different streams of a token.

    Args:
        x: streams [..., n, C]. A stream of zeros counts as orthogonal to the others.

    Returns:
        Mean over pairs of streams and over tokens; 1 for n = 1.

    Example:
        >>> import torch
        >>> from manifold_hc.diagnostics import pairwise_cosine
        >>> pairwise_cosine(torch.eye(4, 8))
        0.0
    """
    n = x.shape[-2]
    if n == 1:
        return 1.0
    gram = _gram(normalize(x.double(), dim=-1))
    diagonal = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return float(((gram.sum((-1, -2)) - diagonal) / (n * (n - 1))).mean())


def effective_rank(x: Float[Tensor, "*batch n C"]) -> float:
    """Compute the exponential of the entropy of a token's normalised singular values.

    Roy and Vetterli, "The effective rank", 2007.

    Args:
        x: streams [..., n, C].

    Returns:
        Mean over tokens, from 1 for parallel streams to n for orthogonal ones of equal norm; NaN
        if a stream is not finite.

    Example:
        >>> import torch
        >>> from manifold_hc.diagnostics import effective_rank
        >>> round(effective_rank(torch.eye(4, 8)), 3)
        4.0
    """
    gram = _gram(x.double())
    if not gram.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum(-1).exp().mean())


def _gram(x: Float[Tensor, "*batch n C"]) -> Float[Tensor, "*batch n n"]:
    """Compute the Gram matrix x x^T of the streams."""
    return x @ x.mT

"""Whether the streams still hold different things."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def pairwise_cosine(x: Float[Tensor, "*batch n C"]) -> float:
    """Mean cosine between two different streams of a token; 1 for a single stream.

    A stream of zeros counts as orthogonal to the others.
    """
    n = x.shape[-2]
    if n == 1:
        return 1.0
    gram = _gram(normalize(x.double(), dim=-1))
    own = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return float(((gram.sum((-1, -2)) - own) / (n * (n - 1))).mean())


def effective_rank(x: Float[Tensor, "*batch n C"]) -> float:
    """Exponential of the entropy of a token's normalised singular values, mean over tokens.

    Between 1, when all streams point one way, and n (Roy and Vetterli, 2007); NaN for
    streams that are not finite.
    """
    gram = _gram(x.double())
    if not gram.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum(-1).exp().mean())


def _gram(x: Float[Tensor, "*batch n C"]) -> Float[Tensor, "*batch n n"]:
    return x @ x.mT

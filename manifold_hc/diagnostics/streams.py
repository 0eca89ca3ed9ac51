"""Whether the streams still hold different things."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def pairwise_cosine(x: Float[Tensor, "*batch n C"]) -> float:
    """Mean cosine between two different streams of a token; 1 for a single stream."""
    n = x.shape[-2]
    if n == 1:
        return 1.0
    gram = _gram(normalize(x.double(), dim=-1))
    return float(((gram.sum((-1, -2)) - n) / (n * (n - 1))).mean())


def effective_rank(x: Float[Tensor, "*batch n C"]) -> float:
    """Exponential of the entropy of a token's normalised singular values, mean over tokens.

    Between 1, when all streams point one way, and n (Roy and Vetterli, 2007); NaN for
    streams that are not finite.
    """
    gram = _gram(x.double())
    if not gram.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum(-1, keepdim=True)
    return float(torch.special.entr(share).sum(-1).exp().mean())


def _gram(x: Float[Tensor, "*batch n C"]) -> Float[Tensor, "*batch n n"]:
    return x @ x.mT

"""Decoder, dense or with experts: tokens -> streams -> sublayers -> exit -> logits."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, repeat
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from manifold_hc.config import ConnectionConfig, Recompute
from manifold_hc.connection import Branch
from manifold_hc.errors import ConfigError, require_at_least_one, require_number
from manifold_hc.models.attention import AttentionConfig, LatentAttention
from manifold_hc.models.cache import Cache, read_context
from manifold_hc.models.documents import group_documents
from manifold_hc.models.experts import Experts, ExpertsConfig, mixtures
from manifold_hc.models.feed_forward import GatedFeedForward
from manifold_hc.models.norm import RMSNorm
from manifold_hc.precision import compute_dtype
from manifold_hc.stack import Stack, only, present


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder."""

    vocabulary: int = 256
    """Vocabulary size V; 256 for bytes."""
    channels: int = 96
    """Hidden size C."""
    blocks: int = 12
    """Number of blocks, each an attention and a feed-forward sublayer."""
    feed_forward: int = 256
    """Hidden size of the dense feed-forward sublayers."""
    norm_eps: float = 1e-20
    """Epsilon of every RMS norm; default as in the paper."""
    init_std: float = 0.02
    """Standard deviation of initial weight matrices."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Sizes of the attention sublayers."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Sizes of the mixtures of experts."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid sizes."""
        require_at_least_one(self, "vocabulary", "channels", "blocks", "feed_forward")
        require_number(self, "norm_eps", "init_std")
        if self.experts.routed and self.experts.dense_blocks >= self.blocks:
            raise ConfigError(
                f"experts.dense_blocks: must be below blocks={self.blocks}, or no block has "
                f"experts, but is {self.experts.dense_blocks}"
            )

    @property
    def sublayers(self) -> int:
        """Number L of sublayers: attention and feed-forward count as one each."""
        return 2 * self.blocks


class Decoder(nn.Module):
    """Causal language model with configurable connections between its sublayers.

    `part` returns consecutive sublayers as a decoder of their own, for a pipeline stage.
    """

    embedding: nn.Embedding | None
    norm: RMSNorm | None
    head: nn.Linear | None

    def __init__(
        self, config: DecoderConfig, connection: ConnectionConfig, recompute: Recompute = None
    ) -> None:
        """Initialise from torch's current random state; equal seeds give equal branches.

        recompute: recomputation of the streams in backward, as for `Stack`.
        """
        super().__init__()
        self.config = config
        C = config.channels
        self.embedding = nn.Embedding(config.vocabulary, C)
        self.branches = nn.ModuleList()
        for block in range(config.blocks):
            attention = LatentAttention(C, config.attention, config.norm_eps)
            self.branches.extend((attention, self._feed_forward(block)))
        self.norms = nn.ModuleList(RMSNorm(C, eps=config.norm_eps) for _ in self.branches)
        self.norm = RMSNorm(C, eps=config.norm_eps)
        self.head = nn.Linear(C, config.vocabulary, bias=False)
        self._fill_matrices()
        self.stack = Stack(C, connection, config.sublayers, recompute)

    def _feed_forward(self, block: int) -> nn.Module:
        config = self.config
        if config.experts.routed and block >= config.experts.dense_blocks:
            with _preserved_rng():
                experts = Experts(config.channels, config.experts)
            _draw_shared(experts)
            return experts
        return GatedFeedForward(config.channels, config.feed_forward)

    def reset_parameters(self) -> None:
        """Reinitialise with the values that the constructor draws from the same random state.

        Matrices are normal with standard deviation `init_std`, norm weights 1, connections as in
        `Maps`. After `to_empty`, this initialises a model that was built on the meta device.
        """
        for module in (self.embedding, *self.branches, *self.norms, self.norm, self.head):
            if isinstance(module, Experts):
                with _preserved_rng():
                    module.reset_parameters()
                _draw_shared(module)
            elif module is not None:
                cast(nn.Linear, module).reset_parameters()
        self._fill_matrices()
        self.stack.reset_parameters()

    def _fill_matrices(self) -> None:
        modules = (self.embedding, self.branches, self.norms, self.norm, self.head)
        for module in modules:
            for parameter in () if module is None else module.parameters():
                if parameter.ndim >= 2:
                    nn.init.normal_(parameter, std=self.config.init_std)

    def part(self, sublayers: Sequence[int]) -> "Decoder":
        """Return consecutive sublayers as a decoder that shares their modules and names.

        The embedding belongs to the first sublayer; exit, final norm and head to the last. Raises
        ConfigError as `Stack.part` does.
        """
        part = Decoder.__new__(Decoder)
        nn.Module.__init__(part)
        part.config = self.config
        part.branches, part.norms = only(self.branches, sublayers), only(self.norms, sublayers)
        part.stack = self.stack.part(sublayers)
        part.embedding = self.embedding if part.stack.begins else None
        part.norm, part.head = (self.norm, self.head) if part.stack.ends else (None, None)
        return part

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | Float[Tensor, "B T n C"],
        documents: Int[Tensor, "B T"] | None = None,
        pre: Float[Tensor, "B T n"] | None = None,
        *,
        mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "..."] | tuple[Tensor, Tensor]:
        """Return the logits [B, T, V] of every next token.

        documents: one integer per token; attention stays within tokens of equal integers. A part
        without the first sublayer takes streams [B, T, n, C], and with single_pass the `pre` of
        the sublayer before; one without the last returns streams, as in `Stack.forward`.
        cache: of the tokens before these, such as a `LatentCache`; it is extended. mask: 0 or False
        for padding, over the S cached and new tokens. last: number of tokens, from the end, whose
        logits are wanted; all by default. Raises ShapeError for a mask that does not fit, and for
        documents with a mask or a cache.
        """
        h = tokens
        if self.embedding is not None:
            h = self.embedding(tokens)  # B T C
            h = h.to(compute_dtype(h))
        branches, norms = self._branches(h, documents, mask, cache), present(self.norms)
        h = self.stack(h, branches, norms, pre)  # B T C, over B T n C
        if self.norm is None or self.head is None:
            return h
        return self.head(self.norm(h if last is None else h[:, max(h.shape[1] - last, 0) :]))

    def _branches(
        self, h: Tensor, documents: Tensor | None, mask: Tensor | None, cache: Cache | None
    ) -> list[Branch]:
        """Branches of the sublayers; those of attention get documents and context."""
        branches: list[Branch] = [*present(self.branches)]
        context, documents = read_context(h, documents, mask, cache)
        if context is None and documents is None:
            return branches
        groups = None if documents is None else group_documents(documents)
        contexts = repeat(None) if context is None else map(context.of_block, count())
        return [
            partial(branch, documents=groups, context=next(contexts))
            if isinstance(branch, LatentAttention)
            else branch
            for branch in branches
        ]


def _preserved_rng() -> AbstractContextManager[None]:
    """Restore the CPU's random state on exit, so that draws inside do not shift later ones."""
    return torch.random.fork_rng(devices=[])


def _draw_shared(experts: Experts) -> None:
    # Of a mixture only the shared experts advance the random state before the decoder fills all
    # matrices: the golden losses depend on this order of draws.
    if experts.shared is not None:
        experts.shared.reset_parameters()


class ParameterCount(NamedTuple):
    """Parameter counts of a decoder, as in the model table of the mHC paper."""

    active: int
    """Parameters that one token uses: all but the embedding and the experts not chosen for it."""
    total: int
    """All parameters."""
    vocabulary: int
    """Parameters of embedding and head."""


def count_parameters(model: Decoder) -> ParameterCount:
    """Count the parameters by shape; the model may be on the meta device."""
    total, ends = _size(model), (model.embedding, model.head)
    idle = sum(
        _size(mixture.routed)
        // mixture.config.routed
        * (mixture.config.routed - mixture.config.active)
        for mixture in mixtures(model).values()
    )
    return ParameterCount(
        active=total - _size(ends[0]) - idle, total=total, vocabulary=sum(map(_size, ends))
    )


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

"""Cache of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), and padding."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manifold_hc.errors import ShapeError


@runtime_checkable
class Cache(Protocol):
    """Latents and rotary keys of past tokens, one tensor per block."""

    @property
    def length(self) -> int:
        """Number S of cached tokens per sequence, padding included."""

    def append(self, block: int, entries: Float[Tensor, "B T E"]) -> Float[Tensor, "B S E"]:
        """Add new tokens to a block's entries; return all of them."""


class LatentCache:
    """Cache of a decoder: for every block [B, S, K + R], the latent and the rotated rotary key.

    It grows by the tokens of each forward pass: `model(tokens, cache=cache)` takes the tokens after
    the cached ones. The connections need no cache: their maps depend on the current token only.

    Example:
        >>> import torch, manifold_hc as mhc
        >>> from manifold_hc.models import Decoder, DecoderConfig, LatentCache
        >>> model = Decoder(DecoderConfig(blocks=2), mhc.ConnectionConfig()).eval()
        >>> tokens = torch.randint(0, 256, (1, 9))
        >>> cache = LatentCache()
        >>> first = model(tokens[:, :8], cache=cache)
        >>> last = model(tokens[:, 8:], cache=cache)
        >>> cache.length, torch.allclose(last[:, 0], model(tokens)[:, 8], atol=1e-5)
        (9, True)
    """

    def __init__(self) -> None:
        """The cache is empty."""
        self._entries: list[Tensor] = []

    @property
    def length(self) -> int:
        """Number S of cached tokens per sequence, padding included."""
        return self._entries[0].shape[1] if self._entries else 0

    @property
    def bytes(self) -> int:
        """Memory of the entries in bytes: B S (K + R) numbers a block."""
        return sum(entries.numel() * entries.element_size() for entries in self._entries)

    def append(self, block: int, entries: Float[Tensor, "B T E"]) -> Float[Tensor, "B S E"]:
        """Add new tokens to a block's entries; return all of them.

        Raises ShapeError for another number of sequences than the cached ones.
        """
        if block == len(self._entries):
            self._entries.append(entries)
            return entries
        past = self._entries[block]
        if len(past) != len(entries):
            raise ShapeError(
                f"LatentCache: the tokens must be of {len(past)} sequences, as the cached ones, "
                f"but are of {len(entries)}; give each batch a cache of its own"
            )
        self._entries[block] = torch.cat([past, entries], 1)
        return self._entries[block]

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the sequences with these numbers, in this order; a number may repeat."""
        self._entries = [entries[rows] for entries in self._entries]


@dataclass(eq=False)
class Context:
    """Positions of the tokens of a forward pass, and the keys that they attend to.

    The class is mutable and no tuple for the reason given at `Documents`.
    """

    positions: Int[Tensor, "*rows T"]
    """Position of every new token in its sequence; padding before it is not counted."""
    visible: Bool[Tensor, "rows 1 T S"] | None
    """True where a new token attends to a cached or new one; None for all of them."""
    cache: Cache | None
    """Entries of earlier tokens; None if there are none and none are kept."""
    block: int = 0
    """Number of the block whose entries are read and extended."""

    def of_block(self, block: int) -> "Context":
        """Return the same context for another block."""
        return replace(self, block=block)


def read_context(
    tokens: Tensor, documents: Tensor | None, mask: Tensor | None, cache: Cache | None
) -> tuple[Context | None, Int[Tensor, "B T"] | None]:
    """Return the context of new tokens [B, T, ...], and the documents that they attend within.

    mask: [B, S], False for padding, over cached and new tokens. The first tokens of a cache attend
    as those of a training batch: real tokens form one document and padding another, so that
    neither sees the other and no T x T mask is needed. Raises ShapeError for a mask of another
    shape, and for documents with a mask or a cache.
    """
    if mask is None and cache is None:
        return None, documents
    if documents is not None:
        raise ShapeError("Decoder: documents go with neither mask nor cache; leave one out")
    (rows, new), past = tokens.shape[:2], 0 if cache is None else cache.length
    if mask is not None and mask.shape != (rows, past + new):
        raise ShapeError(
            f"Decoder: mask must be [{rows}, {past + new}], over {past} cached and {new} new "
            f"tokens, but is {list(mask.shape)}"
        )
    if mask is not None and not past and bool(mask.all()):
        mask = None
    if mask is None and cache is None:
        return None, None
    if mask is None:
        positions = torch.arange(past, past + new, device=tokens.device)
    else:
        mask = mask.bool()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    if past:
        return Context(positions, _visible(mask, past, new, tokens.device), cache), None
    return Context(positions, None, cache), None if mask is None else mask.long()


def _visible(
    mask: Bool[Tensor, "B S"] | None, past: int, new: int, device: torch.device
) -> Bool[Tensor, "rows 1 T S"] | None:
    """Keys that each new token attends to: itself, and all real tokens before it."""
    if mask is None and new == 1:
        return None
    shape = (new, past + new)
    earlier = torch.ones(shape, dtype=torch.bool, device=device).tril(past)
    if mask is None:
        return earlier[None, None]
    # Padding attends to itself: kernels differ in the result of a row without any key.
    itself = torch.eye(*shape, dtype=torch.bool, device=device).roll(past, 1)
    return ((earlier & mask.unsqueeze(1)) | itself).unsqueeze(1)

"""Documents that share a sequence, sorted by length so that attention needs no mask."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(eq=False)
class Documents:
    """The documents of a batch in padded groups of similar length, and the way back.

    Tokens are counted over the whole batch, row after row: B * T of them. No tuple, and not frozen:
    of those torch.compile guards every field, and compiles anew for another number of groups.
    """

    groups: list[Int[Tensor, "_documents _longest"]]
    """Token numbers of every document; a shorter one repeats its last token at the end."""
    slots: Int[Tensor, " tokens"]
    """Where each token stands in the groups, flattened and one after the other."""


def group_documents(documents: Int[Tensor, "B T"]) -> Documents:
    """Group the documents of a batch for causal attention within each.

    documents: an integer for each token; tokens of a row with equal integers are one document, in
    their order. A group holds lengths above half its longest, so padding at most doubles a
    document and there are at most log2(T) + 1 groups. Waits for the device that holds `documents`.
    """
    batch, length = documents.shape
    numbers = documents.cpu()
    rows = torch.arange(batch).unsqueeze(1).expand(batch, length)
    order = numbers.argsort(dim=1, stable=True)
    names = torch.stack([rows.flatten(), numbers.gather(1, order).flatten()])
    order = (order + length * rows).flatten()
    sizes = torch.unique_consecutive(names, dim=1, return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    bits = sizes.new_tensor([(size - 1).bit_length() for size in sizes.tolist()])

    groups, slots, filled = [], torch.empty_like(order), 0
    for chosen in (bits == width for width in bits.unique()):
        size, start = sizes[chosen].unsqueeze(1), starts[chosen].unsqueeze(1)
        position = torch.arange(int(size.max()))
        tokens = order[start + position.minimum(size - 1)]
        own = position < size
        slots[tokens[own]] = filled + own.flatten().nonzero().squeeze(1)
        groups.append(tokens.to(documents.device))
        filled += tokens.numel()
    return Documents(groups, slots.to(documents.device))

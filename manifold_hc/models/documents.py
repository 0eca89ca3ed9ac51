"""Documents of a batch, grouped by length so that attention within each needs no mask."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(eq=False)
class Documents:
    """Documents of a batch in padded groups of similar length, with the inverse index.

    Tokens are numbered over the whole batch, row after row: B * T of them. The class is mutable and
    no tuple: torch.compile guards every field of those, and would recompile for every number of
    groups.
    """

    groups: list[Int[Tensor, "_documents _longest"]]
    """Token numbers of every document; a shorter document repeats its last token as padding."""
    slots: Int[Tensor, " tokens"]
    """Position of each token in the flattened and concatenated groups."""


def group_documents(documents: Int[Tensor, "B T"]) -> Documents:
    """Group the documents of a batch by length, for causal attention within each.

    documents: one integer per token; tokens of a row with equal integers form one document, in
    their order. A group holds lengths above half its longest, so padding at most doubles a
    document and there are at most log2(T) + 1 groups. Synchronises with the device that holds
    `documents`.
    """
    batch, length = documents.shape
    numbers = documents.cpu()
    rows = torch.arange(batch).unsqueeze(1).expand(batch, length)
    # Sort each row by document, so that every document is a run of consecutive entries of `order`.
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
        is_token = position < size  # false for padding
        slots[tokens[is_token]] = filled + is_token.flatten().nonzero().squeeze(1)
        groups.append(tokens.to(documents.device))
        filled += tokens.numel()
    return Documents(groups, slots.to(documents.device))

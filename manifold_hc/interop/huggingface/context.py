"""The context of models whose positions are a table: they cannot run on a longer text."""

import re
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from manifold_hc.errors import ConfigError, DataError

TABLE = re.compile(r"(^|\.)(wpe|embed_positions|positions?_embed(dings?)?|pos_encoding)$")
"""Names of tables of positions: of GPT-2, of OPT and GPT-J, of BERT and the first GPT, of CTRL."""


def require_context(model: PreTrainedModel, lengths: Mapping[str, int], max_tokens: int) -> None:
    """Raise an error unless every prompt and its new tokens have a position in the model's table.

    Args:
        model: any causal language model.
        lengths: number of tokens of each prompt, by its name in messages.
        max_tokens: largest number of new tokens per prompt.

    Raises:
        DataError: if a prompt leaves no room for a new token.
        ConfigError: if `max_tokens` is more than the room that the longest prompt leaves.
    """
    context = hard_context(model)
    if context is None or not lengths:
        return
    longest = max(lengths, key=lambda name: lengths[name])
    room = context - lengths[longest]
    if room < 1:
        raise DataError(
            f"{longest}: has {lengths[longest]} tokens but the context length of the model is "
            f"{context}; give at most {context - 1}"
        )
    if max_tokens > room:
        raise ConfigError(
            f"max_tokens: must be at most {room} but is {max_tokens}, since the context length of "
            f"the model is {context} and {longest} has {lengths[longest]} tokens; "
            f"use --max-tokens {room}"
        )


def hard_context(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that a model can run on; None if none is known.

    Models with rotary or relative positions run on any length.
    """
    sizes = [
        _positions(table)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and TABLE.search(name)
    ]
    sizes += [len(table) for name, table in model.named_buffers() if TABLE.search(name)]
    if not sizes:
        return None
    stated = getattr(model.config, "max_position_embeddings", None)
    return min(sizes if stated is None else [*sizes, stated])


def _positions(table: nn.Embedding) -> int:
    """Number of positions of an embedding; those of RoBERTa begin after the padding token's."""
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)

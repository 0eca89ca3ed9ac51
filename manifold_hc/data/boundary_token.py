"""Boundary token: the token between documents, chosen from a tokenizer's end-of-text tokens."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from manifold_hc.errors import ConfigError
from manifold_hc.files import read_regular

CONFIG = "tokenizer_config.json"
"""File next to a tokenizer.json that names its end-of-text token, written by transformers."""

END_OF_TEXT = (
    "endoftext",
    "endofdocument",
    "eod",
    "endofsentence",
    "eos",
    "eostoken",
    "</s>",
    "sep",
)
"""Names of end-of-text tokens, normalized by `_normalized`; the first match wins."""

END_OF_TURN = (
    "imend",
    "eotid",
    "eomid",
    "endofturn",
    "endofturntoken",
    "turn",
    "end",
    "eot",
    "return",
)
"""Names of end-of-turn tokens of a chat; any end-of-text token wins over them."""


class BoundaryToken(NamedTuple):
    """The token between documents, and the rule that chose it."""

    id: int | None
    """None if the tokenizer has no such token."""
    name: str
    reason: str
    """The rule that chose it, for the log."""
    others: tuple[str, ...] = ()
    """Other end-of-text tokens of the tokenizer."""


def choose_boundary_token(
    name: str, file: Path, ids: Mapping[str, int], special: Mapping[str, int]
) -> BoundaryToken:
    """Choose the boundary token of the tokenizer in `file`; the first rule that applies decides.

    1. `name`, any token of the tokenizer.
    2. `eos_token` of the tokenizer_config.json next to `file`, unless it is an end-of-turn token
       and the tokenizer has an end-of-text token.
    3. The token marked special whose name comes first in `END_OF_TEXT`, then in `END_OF_TURN`;
       of two with the same normalized name, such as `<eos>` and `[EOS]`, the smaller id.

    Args:
        name: value of `data.boundary`, "" if it is not given.
        file: the tokenizer.json.
        ids: id of every token.
        special: id of every token marked special.

    Raises:
        ConfigError: if the tokenizer has no token `name`.
    """
    if name and name not in ids:
        raise ConfigError(f"data.boundary: {file} has no token {name!r}; give one that it has")
    if name:
        return BoundaryToken(ids[name], name, "as named by data.boundary")
    found = sorted((_rank(token), id_, token) for token, id_ in special.items() if _is_known(token))
    ends = [token for rank, _, token in found if rank < len(END_OF_TEXT)]
    configured = _configured_token(file)
    if configured in ids and not (ends and _normalized(configured) in END_OF_TURN):
        return BoundaryToken(ids[configured], configured, f"eos_token of {file.with_name(CONFIG)}")
    if not found:
        return BoundaryToken(None, "", "no special token has the name of an end of text")
    _, id_, token = found[0]
    return BoundaryToken(id_, token, "by its name", tuple(ends[1:] if ends else ()))


def end_of_text_names(ids: Mapping[str, int]) -> list[str]:
    """Return the tokens with a name in `END_OF_TEXT`, special or not, in the order of that list."""
    found = [token for token in ids if _normalized(token) in END_OF_TEXT and not token.isalnum()]
    return sorted(found, key=_rank)


def _configured_token(file: Path) -> str:
    """Return the `eos_token` of the configuration next to `file`, "" if it has none."""
    try:
        config = msgspec.json.decode(read_regular(file.with_name(CONFIG)), type=dict)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    token = config.get("eos_token")
    if isinstance(token, dict):  # an AddedToken, as older versions write it
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _normalized(token: str) -> str:
    """Normalize the name of a token: eos for `<|EOS|>`, `[eos]` and `<eos>`."""
    return token if token == "</s>" else re.sub(r"[^0-9a-z]", "", token.casefold())


def _is_known(token: str) -> bool:
    return _normalized(token) in END_OF_TEXT + END_OF_TURN


def _rank(token: str) -> int:
    return (END_OF_TEXT + END_OF_TURN).index(_normalized(token))

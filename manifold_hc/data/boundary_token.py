"""The token between documents: which of a tokenizer's tokens is the end of a text."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from manifold_hc.errors import ConfigError
from manifold_hc.files import read_regular

CONFIG = "tokenizer_config.json"
"""File beside a tokenizer.json that names its end of text, as transformers writes it."""

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
"""Names of an end of text, as `_plain` writes them; earlier ones win."""

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
"""Names of the end of what one speaker says in a chat; any end of text wins over them."""


class Boundary(NamedTuple):
    """The token between documents, and how it was chosen."""

    id: int | None
    """None where the tokenizer has no such token."""
    name: str
    reason: str
    """The witness, for the log."""
    others: tuple[str, ...] = ()
    """Tokens that could have been meant as well."""


def choose_boundary(
    name: str, file: Path, ids: Mapping[str, int], special: Mapping[str, int]
) -> Boundary:
    """The boundary of the tokenizer in `file`, by the first of these that there is.

    1. `name`, of any token.
    2. `eos_token` of the tokenizer_config.json beside `file`, unless that ends a turn of a chat
       and the tokenizer has an end of text.
    3. The token marked special whose name comes first in `END_OF_TEXT`, then in `END_OF_TURN`;
       of two with the same name, such as `<eos>` and `[EOS]`, the one with the smaller id.

    ids: all tokens; special: those marked special. Raises ConfigError for a `name` without token.
    """
    if name and name not in ids:
        raise ConfigError(f"data.boundary: {file} has no token {name!r}; give one that it has")
    if name:
        return Boundary(ids[name], name, "as named by data.boundary")
    found = sorted((_rank(token), id_, token) for token, id_ in special.items() if _is_known(token))
    ends = [token for rank, _, token in found if rank < len(END_OF_TEXT)]
    told = _told(file)
    if told in ids and not (ends and _plain(told) in END_OF_TURN):
        return Boundary(ids[told], told, f"eos_token of {file.with_name(CONFIG)}")
    if not found:
        return Boundary(None, "", "no special token has the name of an end of text")
    _, id_, token = found[0]
    return Boundary(id_, token, "by its name", tuple(ends[1:] if ends else ()))


def unmarked(ids: Mapping[str, int]) -> list[str]:
    """Tokens with the name of an end of text, by their names' order."""
    found = [token for token in ids if _plain(token) in END_OF_TEXT and not token.isalnum()]
    return sorted(found, key=_rank)


def _told(file: Path) -> str:
    """The end of text that the configuration beside `file` names, or nothing."""
    try:
        config = msgspec.json.decode(read_regular(file.with_name(CONFIG)), type=dict)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    token = config.get("eos_token")
    if isinstance(token, dict):  # an AddedToken, as older versions write it
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _plain(token: str) -> str:
    """The name without its dress: eos of `<|EOS|>`, `[eos]` and `<eos>`."""
    return token if token == "</s>" else re.sub(r"[^0-9a-z]", "", token.casefold())


def _is_known(token: str) -> bool:
    return _plain(token) in END_OF_TEXT + END_OF_TURN


def _rank(token: str) -> int:
    return (END_OF_TEXT + END_OF_TURN).index(_plain(token))

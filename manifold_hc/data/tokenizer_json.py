"""Contents of a tokenizer.json, and a copy of it that never turns text into a special token.

The library matches added tokens in a text before its model sees it: a web page that contains the
characters `<|endoftext|>` would get the end-of-text token. `TokenizerJson.for_text` is a tokenizer
that gives the same ids otherwise, and no random ones.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

UNREACHABLE = "\0"
"""Prefix of the name of a token that no text contains: a text with NUL is an error."""

SPACE = "▁"
"""SentencePiece's character for a space."""

WORDS = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
"""Regular expression of a word with the spaces before it, written as `SPACE`."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


@dataclass(frozen=True)
class TokenizerJson:
    """Members of a tokenizer.json, undecoded, so that scores keep all digits."""

    members: dict[str, Raw]
    model: dict[str, Raw]

    @classmethod
    def read(cls, source: bytes) -> "TokenizerJson":
        """Parse a file's content; msgspec.MsgspecError or UnicodeDecodeError if it is not valid."""
        members = msgspec.json.decode(source, type=dict[str, Raw])
        model = msgspec.json.decode(members.get("model", Raw(b"{}")), type=dict[str, Raw])
        return cls(members, model)

    @property
    def special(self) -> dict[str, int]:
        """Ids of the tokens that are marked special, by name."""
        tokens = self._member("added_tokens", list[_AddedToken] | None) or []
        return {token.content: token.id for token in tokens if token.special}

    @property
    def dropout(self) -> float:
        """Probability that BPE skips a merge."""
        return _value(self.model, "dropout", float | None) or 0.0

    @property
    def covers_unknown(self) -> bool:
        """True if a character outside the vocabulary gets ids; BPE drops it otherwise."""
        model = {key: _value(self.model, key, Any) for key in ("unk_token", "byte_fallback")}
        byte_level = any(
            b'"ByteLevel"' in bytes(self.members.get(key, Raw(b"")))
            for key in ("normalizer", "pre_tokenizer")
        )
        return self.kind != "BPE" or byte_level or any(model.values())

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel; files of old versions do not name it."""
        named = _value(self.model, "type", str | None)
        return named or ("BPE" if "merges" in self.model else "Unigram")

    def step_types(self, member: str) -> set[str]:
        """Return the types of the steps of "normalizer" or "pre_tokenizer"."""
        found: set[str] = set()
        _collect_types(self._member(member, Any), found)
        return found

    def for_text(self, protected: Collection[str]) -> bytes:
        """Return a tokenizer.json with the same ids for texts, except that none is a protected one.

        protected: names of the special tokens. A protected token of one character remains
        reachable: that character has no other token.
        """
        hidden = {name for name in protected if len(name) > 1}
        model = dict(self.model)
        model.pop("dropout", None)
        model["vocab"] = _encoded(self._renamed_vocabulary(hidden))
        if _value(model, "unk_token", str | None) in hidden:
            model["unk_token"] = _encoded(UNREACHABLE + _value(model, "unk_token", str))
        if "merges" in model:
            model["merges"] = _encoded(self._merges(hidden))
        members = dict(self.members)
        members["model"] = _encoded(model)
        members["added_tokens"] = _encoded(self._renamed_added(hidden, set(protected)))
        members["pre_tokenizer"] = _encoded(self._pre_tokenizer(protected))
        # A post-processor adds special tokens around a text; the other two are switched off anyway.
        for key in ("post_processor", "truncation", "padding"):
            members[key] = Raw(b"null")
        return msgspec.json.encode(members)

    @property
    def _vocabulary(self) -> dict[str, int] | list[tuple[str, Raw]]:
        vocabulary: dict[str, int] | list[tuple[str, Raw]] = _value(
            self.model, "vocab", dict[str, int] | list[tuple[str, Raw]]
        )
        return vocabulary

    def _renamed_vocabulary(self, hidden: set[str]) -> dict[str, int] | list[tuple[str, Raw]]:
        """Rename hidden tokens in the vocabulary, where Unigram would find them by itself."""
        vocabulary = self._vocabulary
        if isinstance(vocabulary, dict):
            return {_renamed(name, hidden): id_ for name, id_ in vocabulary.items()}
        return [(_renamed(name, hidden), score) for name, score in vocabulary]

    def _renamed_added(self, hidden: set[str], protected: set[str]) -> list[dict[str, Any]]:
        """Rename hidden added tokens: they take the ids of these names in the vocabulary."""
        tokens: list[dict[str, Any]] = (
            self._member("added_tokens", list[dict[str, Any]] | None) or []
        )
        for token in tokens:
            if token["content"] in protected:
                token["special"] = True
            token["content"] = _renamed(token["content"], hidden)
        return tokens

    def _merges(self, hidden: set[str]) -> list[Any]:
        """Return the merges that neither produce nor use a hidden token."""
        prefix = _value(self.model, "continuing_subword_prefix", str | None) or ""
        merges: list[str | tuple[str, str]] = _value(
            self.model, "merges", list[str | tuple[str, str]]
        )
        kept = []
        for merge in merges:
            first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
            merged = first + second.removeprefix(prefix)
            if hidden.isdisjoint((first, second, merged)):
                kept.append(merge)
        return kept

    def _pre_tokenizer(self, protected: Collection[str]) -> Any:
        """Return the tokenizer's own pre-tokenizer, plus a split into words if ids stay the same.

        SentencePiece's BPE has no pre-tokenizer: the library sees the whole text as one word. If no
        token has a space after another character, no merge crosses the start of a word, and a split
        there gives the same ids.
        """
        own = self._member("pre_tokenizer", Any)
        if not self._merges_within_words(protected):
            return own
        words = {
            "type": "Split",
            "pattern": {"Regex": WORDS},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [step for step in (own, words) if step]}

    def _merges_within_words(self, protected: Collection[str]) -> bool:
        """Return True if no merge of this BPE crosses the start of a word."""
        vocabulary = self._vocabulary if isinstance(self._vocabulary, dict) else {}
        by_word = ("ignore_merges", "end_of_word_suffix", "continuing_subword_prefix")
        return (
            self.kind == "BPE"
            and SPACE in vocabulary
            and not any(_value(self.model, key, Any) for key in by_word)
            and not any(SPACE in name.lstrip(SPACE) for name in set(vocabulary) - set(protected))
        )

    def _member(self, name: str, kind: Any) -> Any:
        return _value(self.members, name, kind)


def _value(members: dict[str, Raw], name: str, kind: Any) -> Any:
    """Decode a member as `kind`; a missing one is null."""
    return msgspec.json.decode(members.get(name, Raw(b"null")), type=kind)


def _encoded(value: Any) -> Raw:
    return Raw(msgspec.json.encode(value))


def _renamed(name: str, hidden: set[str]) -> str:
    return UNREACHABLE + name if name in hidden else name


def _collect_types(step: Any, found: set[str]) -> None:
    """Add the types of a step and of the steps inside it to `found`."""
    if isinstance(step, dict):
        if isinstance(step.get("type"), str):
            found.add(step["type"])
        for value in step.values():
            _collect_types(value, found)
    elif isinstance(step, list):
        for value in step:
            _collect_types(value, found)

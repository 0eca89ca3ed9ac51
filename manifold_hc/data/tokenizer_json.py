"""A tokenizer.json as data: its tokens, and the copy of it that encodes text as text.

The library matches added tokens in a text before its model sees it, so a web page that spells
`<|endoftext|>` would hold the end of a document. `Definition.for_text` is the same tokenizer
without any such way from a text to a protected token, and without random choices.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

NEVER = "\0"
"""Begins the name of a token that no text can spell: texts with NUL are refused."""

SPACE = "▁"
"""What SentencePiece writes for a space."""

WORDS = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
"""A word and the spaces before it, where spaces are written as `SPACE`."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


@dataclass(frozen=True)
class Definition:
    """The members of a tokenizer.json; numbers keep their digits, so scores keep their bits."""

    members: dict[str, Raw]
    model: dict[str, Raw]

    @classmethod
    def read(cls, source: bytes) -> "Definition":
        """Raises msgspec.MsgspecError or UnicodeDecodeError for JSON of another shape."""
        members = msgspec.json.decode(source, type=dict[str, Raw])
        model = msgspec.json.decode(members.get("model", Raw(b"{}")), type=dict[str, Raw])
        return cls(members, model)

    @property
    def special(self) -> dict[str, int]:
        """Id of every token that is marked special."""
        tokens = self._member("added_tokens", list[_AddedToken] | None) or []
        return {token.content: token.id for token in tokens if token.special}

    @property
    def dropout(self) -> float:
        """Probability with which BPE leaves out a merge."""
        return _value(self.model, "dropout", float | None) or 0.0

    @property
    def unknown(self) -> bool:
        """Whether characters outside the vocabulary have an id or bytes; BPE drops them if not."""
        model = {key: _value(self.model, key, Any) for key in ("unk_token", "byte_fallback")}
        byte_level = any(
            b'"ByteLevel"' in bytes(self.members.get(key, Raw(b"")))
            for key in ("normalizer", "pre_tokenizer")
        )
        return self.kind != "BPE" or byte_level or any(model.values())

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel; files of old versions say it by their members."""
        named = _value(self.model, "type", str | None)
        return named or ("BPE" if "merges" in self.model else "Unigram")

    def uses(self, member: str) -> set[str]:
        """Types of the steps of "normalizer" or "pre_tokenizer"."""
        found: set[str] = set()
        _collect_types(self._member(member, Any), found)
        return found

    def for_text(self, protected: Collection[str]) -> bytes:
        """The tokenizer.json that gives texts their ids, and never one of a `protected` token.

        Other ids stay what they are. A protected token of one character stays within reach: that
        character has no other spelling.
        """
        hidden = {name for name in protected if len(name) > 1}
        model = dict(self.model)
        model.pop("dropout", None)
        model["vocab"] = _encoded(self._renamed_vocabulary(hidden))
        if _value(model, "unk_token", str | None) in hidden:
            model["unk_token"] = _encoded(NEVER + _value(model, "unk_token", str))
        if "merges" in model:
            model["merges"] = _encoded(self._merges(hidden))
        members = dict(self.members)
        members["model"] = _encoded(model)
        members["added_tokens"] = _encoded(self._renamed_added(hidden, set(protected)))
        members["pre_tokenizer"] = _encoded(self._pre_tokenizer(protected))
        # Frames are not wanted, and what else these do changes no ids.
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
        """The model alone reaches its own words too: Unigram takes `</s>` for a likely piece."""
        vocabulary = self._vocabulary
        if isinstance(vocabulary, dict):
            return {_renamed(name, hidden): id_ for name, id_ in vocabulary.items()}
        return [(_renamed(name, hidden), score) for name, score in vocabulary]

    def _renamed_added(self, hidden: set[str], protected: set[str]) -> list[dict[str, Any]]:
        """Added tokens keep the ids of their names in the vocabulary, so both are renamed."""
        tokens: list[dict[str, Any]] = (
            self._member("added_tokens", list[dict[str, Any]] | None) or []
        )
        for token in tokens:
            if token["content"] in protected:
                token["special"] = True
            token["content"] = _renamed(token["content"], hidden)
        return tokens

    def _merges(self, hidden: set[str]) -> list[Any]:
        """All but those that make or use a hidden token."""
        prefix = _value(self.model, "continuing_subword_prefix", str | None) or ""
        merges: list[str | tuple[str, str]] = _value(
            self.model, "merges", list[str | tuple[str, str]]
        )
        kept = []
        for merge in merges:
            first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
            made = first + second.removeprefix(prefix)
            if hidden.isdisjoint((first, second, made)):
                kept.append(merge)
        return kept

    def _pre_tokenizer(self, protected: Collection[str]) -> Any:
        """The tokenizer's own, and one that splits between words where no token joins two.

        SentencePiece's BPE has none: the whole text is one word to the library. Where no token has
        a space behind another character, no merge crosses the start of a word, and splitting there
        first gives the same ids.
        """
        own = self._member("pre_tokenizer", Any)
        if not self._keeps_words_apart(protected):
            return own
        words = {
            "type": "Split",
            "pattern": {"Regex": WORDS},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [step for step in (own, words) if step]}

    def _keeps_words_apart(self, protected: Collection[str]) -> bool:
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
    return msgspec.json.decode(members.get(name, Raw(b"null")), type=kind)


def _encoded(value: Any) -> Raw:
    return Raw(msgspec.json.encode(value))


def _renamed(name: str, hidden: set[str]) -> str:
    return NEVER + name if name in hidden else name


def _collect_types(step: Any, found: set[str]) -> None:
    if isinstance(step, dict):
        if isinstance(step.get("type"), str):
            found.add(step["type"])
        for value in step.values():
            _collect_types(value, found)
    elif isinstance(step, list):
        for value in step:
            _collect_types(value, found)

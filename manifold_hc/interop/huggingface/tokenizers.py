"""Our tokenizers as transformers' tokenizers, with the same ids."""

import json
import logging

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from manifold_hc.data.tokenizer import Tokenizer

logger = logging.getLogger("manifold_hc")

NUL = "\0"
"""Text of the byte 0, the token between documents of a byte tokenizer."""

DROPPED = ("post_processor", "truncation", "padding")
"""Members of a tokenizer.json that change the ids of a text: training has none of them."""


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers with the same ids for every text.

    As in training, no token is added around a text, and a text that spells a special token gets the
    ids of its characters (`split_special_tokens`). The token between documents becomes `eos_token`
    and `pad_token`.

    tokenizer: of a run: bytes, or a tokenizer.json. A Unigram tokenizer finds special tokens in a
    text by itself, which a warning in the log says.

    Example:
        >>> from manifold_hc.data.tokenizer import tokenizer
        >>> from manifold_hc.interop.huggingface import as_transformers
        >>> as_transformers(tokenizer("bytes"))("é!")["input_ids"]
        [195, 169, 33]
    """
    is_bytes = not tokenizer.source
    library = _bytes() if is_bytes else _plain(tokenizer.source)
    special = {}
    if tokenizer.boundary is not None:
        end = NUL if is_bytes else tokenizer.boundary_name
        special = {"eos_token": end, "pad_token": end}
    made = PreTrainedTokenizerFast(
        tokenizer_object=library,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=not is_bytes,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    for name in () if is_bytes else made.all_special_tokens:
        ours = tokenizer.encode([name])[0].tolist()
        if made(name, add_special_tokens=False)["input_ids"] != ours:
            logger.warning("%s: a text that spells %s gets another id here", tokenizer.name, name)
    return made


def _bytes() -> Library:
    """Bytes as a BPE without merges: the byte b has the id b."""
    ids = {character: byte for byte, character in enumerate(_characters())}
    del ids[_characters()[0]]
    ids[NUL] = 0
    library = Library(models.BPE(vocab=ids, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(NUL, special=True, normalized=False)])
    return library


def _characters() -> list[str]:
    """Characters that stand for the bytes 0 to 255 in a byte-level vocabulary (GPT-2).

    Printable ones of Latin-1 stand for themselves, the others are U+0100 and following.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _plain(source: bytes) -> Library:
    """Load a tokenizer.json without the members that change ids."""
    members = json.loads(source)
    members.update(dict.fromkeys(DROPPED))
    if members["model"].get("dropout"):
        members["model"]["dropout"] = None
    return Library.from_str(json.dumps(members))

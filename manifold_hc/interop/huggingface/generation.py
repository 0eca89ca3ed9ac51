"""Texts continued by a model of transformers: sampling, batches with padding, streaming."""

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from manifold_hc.errors import ConfigError, DataError, require_at_least_one, require_number
from manifold_hc.interop.huggingface.context import require_context

INCOMPLETE = "\ufffd"
"""Character in place of bytes that are not UTF-8, such as the first bytes of a longer character."""

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many."""

    max_tokens: int = 200
    """Largest number of new tokens per text."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Share of the probability, from the most likely tokens on, that is sampled from."""
    seed: int = 0
    """Seed of the random numbers."""
    cache: bool = True
    """Keep the latents of past tokens; without, every token recomputes the whole text."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid values."""
        require_at_least_one(self, "max_tokens")
        require_number(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: must be above 0 and at most 1 but is {self.top_p}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed: must be from 0 to {LARGEST_SEED} but is {self.seed}")


@dataclass(frozen=True)
class Continuation:
    """A text that a model has written."""

    prompt: str
    """Text that it continues."""
    text: str
    """New text, without the prompt."""
    prompt_tokens: int
    """Number of tokens of the prompt."""
    tokens: int
    """Number of new tokens, the end of the document included."""
    ended: bool
    """True if the model ended the document, False if the tokens were used up."""


def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    batch: int = 8,
    on_text: Callable[[str], object] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Continuation]:
    """Continue every prompt with `model.generate`; return an iterator over the texts, in order.

    Args:
        model: any causal language model of transformers.
        tokenizer: its tokenizer.
        prompts: the texts to continue.
        sampling: temperature and the like; equal seeds give equal texts for equal prompts.
        batch: number of prompts that are continued at once, padded on the left.
        on_text: gets the new text piece by piece, complete characters only; for one prompt.
        names: names of the prompts in messages, such as file and line; their numbers by default.

    Raises:
        DataError: for a prompt without tokens, or one that fills the context of the model.
        ConfigError: for `on_text` with several prompts, a batch below 1, or more tokens than the
            learned positions of the model.

    Example:
        >>> from manifold_hc.data.tokenizer import tokenizer
        >>> from manifold_hc.interop import huggingface
        >>> config = huggingface.ManifoldConfig(model={"blocks": 2})
        >>> model = huggingface.ManifoldForCausalLM(config).eval()
        >>> names = huggingface.as_transformers(tokenizer("bytes"))
        >>> greedy = huggingface.Sampling(max_tokens=5, temperature=0)
        >>> [made] = huggingface.continue_texts(model, names, ["It was"], greedy)
        >>> made.prompt, made.prompt_tokens, made.tokens
        ('It was', 6, 5)
    """
    if batch < 1:
        raise ConfigError(f"batch: must be at least 1 but is {batch}")
    if on_text is not None and len(prompts) != 1:
        raise ConfigError(f"on_text: streams one prompt but there are {len(prompts)}")
    if names is None:
        names = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    encoded = [
        (prompt, _encode(tokenizer, prompt, name))
        for prompt, name in zip(prompts, names, strict=True)
    ]
    lengths = {name: len(ids) for name, (_, ids) in zip(names, encoded, strict=True)}
    require_context(model, lengths, sampling.max_tokens)
    batches = [encoded[first : first + batch] for first in range(0, len(encoded), batch)]
    return _continue(model, tokenizer, batches, sampling, on_text)


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[tuple[str, list[int]]]],
    sampling: Sampling,
    on_text: Callable[[str], object] | None,
) -> Iterator[Continuation]:
    """Yield the continuations of batches of prompts, each with its ids."""
    settings = _settings(model, sampling)
    ends = _ends(settings)
    seeds = torch.Generator().manual_seed(sampling.seed)
    for batch in batches:
        ids = [own for _, own in batch]
        streamer = on_text and TextStreamer(Detokenizer(tokenizer, ids[0]), ends, on_text)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(LARGEST_SEED, (), generator=seeds)))
            made = _generate(model, ids, settings, streamer)
        for (prompt, own), new in zip(batch, made, strict=True):
            yield _continuation(tokenizer, prompt, own, new, ends)


class Detokenizer:
    """Turns tokens into text as they come; bytes of an incomplete character wait for the rest.

    Only the tokens since the last text are decoded, after those of that text: some tokenizers
    write a token otherwise at the start of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        """prompt: the tokens that the text follows."""
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._known = len(self._ids)

    def add(self, token: int) -> str:
        """Return the text that a token completes, which may be empty."""
        self._ids.append(token)
        return self._take(self._decode(self._ids), final=False)

    def end(self) -> str:
        """Return the rest of the text, U+FFFD for bytes that are not UTF-8."""
        return self._take(self._decode(self._ids), final=True)

    def _take(self, text: str, *, final: bool) -> str:
        if text.endswith(INCOMPLETE) and not final:
            return ""
        new = text[len(self._decode(self._ids[: self._known])) :]
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=True))


class TextStreamer(BaseStreamer):
    """Streamer of `generate` that hands on the new text of one sequence."""

    def __init__(
        self, detokenizer: Detokenizer, ends: Container[int], on_text: Callable[[str], object]
    ) -> None:
        """ends: tokens that end a text, without text of their own. on_text: gets each piece."""
        self._detokenizer = detokenizer
        self._ends = ends
        self._on_text = on_text
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first ones are the prompt."""
        if not self._is_prompt:
            for token in value.flatten().tolist():
                if token not in self._ends and (text := self._detokenizer.add(token)):
                    self._on_text(text)
        self._is_prompt = False

    def end(self) -> None:
        """Hand on the rest."""
        if text := self._detokenizer.end():
            self._on_text(text)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, name: str) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DataError(f"{name}: {prompt!r} gives no tokens; give some text")
    return ids


def _settings(model: PreTrainedModel, sampling: Sampling) -> GenerationConfig:
    """Return the model's own settings, such as its end tokens, with those of `sampling`."""
    settings = copy.deepcopy(model.generation_config)
    settings.max_length = None
    samples = sampling.temperature > 0
    settings.update(
        max_new_tokens=sampling.max_tokens,
        do_sample=samples,
        temperature=sampling.temperature if samples else None,
        top_p=sampling.top_p if samples else None,
        top_k=0 if samples else None,
        num_beams=1,
        use_cache=sampling.cache,
    )
    if settings.pad_token_id is None:
        settings.pad_token_id = min(_ends(settings), default=0)  # hidden by the attention mask
    return settings


def _ends(settings: GenerationConfig) -> set[int]:
    """Ids of the tokens that end a text."""
    found: Any = settings.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """Return the new tokens of every prompt, with padding after its end."""
    longest = max(map(len, prompts))
    padding = [longest - len(ids) for ids in prompts]
    pairs = list(zip(padding, prompts, strict=True))
    ids = torch.tensor([[settings.pad_token_id] * pad + list(own) for pad, own in pairs])
    mask = torch.tensor([[0] * pad + [1] * len(own) for pad, own in pairs])
    sequences = cast(Any, model).generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        streamer=streamer,
    )
    new: list[list[int]] = sequences[:, longest:].tolist()
    return new


def _continuation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ids: Sequence[int],
    new: Sequence[int],
    ends: Container[int],
) -> Continuation:
    """Cut the new tokens of a prompt at the first end token and decode those before it."""
    length = next((at for at, token in enumerate(new) if token in ends), len(new))
    ended = length < len(new)
    detokenizer = Detokenizer(tokenizer, ids)
    pieces = [detokenizer.add(token) for token in new[:length]]
    text = "".join([*pieces, detokenizer.end()])
    return Continuation(prompt, text, len(ids), length + ended, ended)

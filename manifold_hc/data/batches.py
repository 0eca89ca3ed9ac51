"""Batches of sequences, determined by the batch's number and the seed."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from manifold_hc.data.corpus import Corpus
from manifold_hc.data.samplers import EpochSampler, WeightedSampler

NO_TARGET = -100
"""Target that the loss ignores: the default `ignore_index` of torch's cross-entropy."""


class Batch(NamedTuple):
    """B sequences of T tokens, int64."""

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    """The next tokens; NO_TARGET after the end of a source."""
    documents: Int[Tensor, "B T"] | None
    """Document number of every token of the whole sequences; None if no sequence has several."""

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), documents)

    def slice_sequences(self, rank: int, size: int) -> "Batch":
        """Return slice `rank` of `size` equal slices of every sequence.

        `documents` remain those of the whole sequences.
        """
        if size == 1:
            return self
        inputs, targets = self.inputs.chunk(size, 1)[rank], self.targets.chunk(size, 1)[rank]
        return Batch(inputs, targets, self.documents)

    def microbatches(self, count: int) -> list["Batch"]:
        """Split the batch into `count` batches with equal numbers of sequences."""
        if count == 1:
            return [self]
        documents = [None] * count if self.documents is None else self.documents.chunk(count)
        split = zip(self.inputs.chunk(count), self.targets.chunk(count), documents, strict=True)
        return [Batch(*fields) for fields in split]


class Batches:
    """Batches of a corpus by number, a pure function of number and seed.

    Runs can therefore be compared with one another, and resumed at any sequence.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence: int,
        batch: int,
        seed: int,
        *,
        mask_documents: bool = True,
    ) -> None:
        """sequence: T; batch: B; mask_documents: False leaves `Batch.documents` None."""
        self.sources = corpus.sources
        self.sequence = sequence
        self.batch = batch
        self.mask_documents = mask_documents
        lengths = [len(source) for source in corpus.sources]
        self._sampler = (
            WeightedSampler(lengths, sequence, seed, corpus.weights)
            if corpus.weights
            else EpochSampler(lengths, sequence, (seed,))
        )
        self.count = self._sampler.whole

    def __getitem__(self, number: int) -> Batch:
        """Return batch `number`, counted from 0 over all epochs."""
        return self.take(number * self.batch, self.batch)

    def take(self, first: int, count: int) -> Batch:
        """Return `count` sequences from sequence `first` on, counted from 0 over all epochs."""
        inputs = np.zeros((count, self.sequence), dtype=np.int64)
        targets = np.full((count, self.sequence), NO_TARGET, dtype=np.int64)
        documents = np.zeros((count, self.sequence), dtype=np.int64)
        for row in range(count):
            number, start = self._sampler[first + row]
            source = self.sources[number]
            length = min(self.sequence, len(source) - 1 - start)
            ids = source.read(start, start + length + 1)
            inputs[row, :length], targets[row, :length] = ids[:-1], ids[1:]
            if self.mask_documents:
                documents[row, :length] = source.documents(start, start + length)
                documents[row, length:] = documents[row, length - 1]
        several = (documents != documents[:, :1]).any()
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(documents) if several else None,
        )

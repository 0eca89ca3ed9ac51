import numpy as np
import pytest
import torch

from manifold_hc.data import Batches, Split
from manifold_hc.errors import DataError


def tokens(count):
    return np.arange(count, dtype=np.uint16)


def test_targets_are_the_next_tokens():
    inputs, targets = Batches(tokens(100), sequence=7, batch=3, seed=0)[4]
    assert inputs.shape == targets.shape == (3, 7)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_an_epoch_sees_every_token_once():
    batches = Batches(tokens(85), sequence=7, batch=3, seed=1)
    assert batches.count == 12
    seen = torch.cat([batches[number][0].flatten() for number in range(4)])
    assert sorted(seen.tolist()) == list(range(84))
    again = torch.cat([batches[number][0].flatten() for number in range(4, 8)])
    assert sorted(again.tolist()) == list(range(84))
    assert not torch.equal(seen, again), "every epoch has its own order"


def test_a_batch_may_span_two_epochs():
    batches = Batches(tokens(29), sequence=7, batch=3, seed=0)
    rows = torch.cat([batches[number][0][:, 0] for number in range(4)])
    assert sorted(rows[:4].tolist()) == sorted(rows[4:8].tolist()) == [0, 7, 14, 21]


def test_a_batch_depends_on_seed_and_number_alone():
    first, second = (Batches(tokens(500), 7, 3, seed=5) for _ in range(2))
    second[40], second[3]
    assert torch.equal(first[17][0], second[17][0])
    assert not torch.equal(first[17][0], Batches(tokens(500), 7, 3, seed=6)[17][0])


def test_split_holds_out_the_end():
    split = Split.of(tokens(1000), sequence=10, fraction=0.1)
    assert (len(split.training), split.validation[0]) == (900, 900)
    assert len(Split.of(tokens(100), sequence=10, fraction=0.01).validation) == 11


def test_a_text_too_short_is_refused():
    Split.of(tokens(22), sequence=10, fraction=0.05)
    with pytest.raises(DataError, match=r"at least 22 tokens.* but has 21"):
        Split.of(tokens(21), sequence=10, fraction=0.05)

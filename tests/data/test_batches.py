from io import StringIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console

from manifold_hc.data import Batches, Corpus, DataConfig, load
from manifold_hc.data.batches import NO_TARGET
from manifold_hc.data.tokens import ArraySegment, Tokens
from manifold_hc.errors import ConfigError, DataError


def corpus(*lengths, weights=(), first=1):
    """Sources whose ids are all different."""
    ends = np.cumsum([first, *lengths])
    ids = [np.arange(a, b, dtype=np.uint16) for a, b in pairwise(ends)]
    return Corpus([Tokens([ArraySegment(i)]) for i in ids], int(ends[-1]), weights)


def documents(*lengths):
    """One source in memory, of documents of these lengths."""
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return Corpus([Tokens([ArraySegment(np.arange(sum(lengths)), starts)])], sum(lengths))


def targets(batches, first, count):
    """Targets of `count` sequences, flattened."""
    found = batches.take(first, count).targets
    return found[found != NO_TARGET].tolist()


def test_targets_are_the_next_tokens():
    inputs, wanted, several = Batches(corpus(100), sequence=7, batch=3, seed=0)[2]
    assert inputs.shape == wanted.shape == (3, 7)
    assert inputs.dtype == torch.int64
    assert torch.equal(wanted, inputs + 1)
    assert several is None


@pytest.mark.parametrize(
    "lengths", [(84,), (85,), (86,), (90,), (50, 30), (21, 14), (8, 9, 100), (2, 40)]
)
def test_an_epoch_sees_every_token_exactly_once(lengths):
    """Every token of every source but its first is a target once, and so an input but its last."""
    batches = Batches(corpus(*lengths), sequence=7, batch=1, seed=1)
    size = sum(-(-(length - 1) // 7) for length in lengths)
    starts = np.cumsum([1, *lengths])[:-1].tolist()
    wanted = [i for i in range(1, sum(lengths) + 1) if i not in starts]
    epochs = [targets(batches, epoch * size, size) for epoch in range(3)]
    assert all(sorted(epoch) == wanted for epoch in epochs)
    if max(lengths) > 14:
        assert epochs[0] != epochs[1] != epochs[2], "every epoch has its own order"


def test_the_tokens_after_the_last_whole_sequence_are_a_shorter_one():
    batch = Batches(corpus(17), sequence=7, batch=3, seed=0)[0]
    assert batch.inputs[2].tolist() == [15, 16, 0, 0, 0, 0, 0]
    assert batch.targets[2].tolist() == [16, 17] + 5 * [NO_TARGET]


def test_a_position_is_a_count_of_sequences():
    """A range of sequences can start anywhere: a run resumes at the exact token."""
    for weights in ((), (3.0, 1.0, 0.5)):
        batches = Batches(corpus(100, 60, 40, weights=weights), sequence=7, batch=4, seed=3)
        whole = batches.take(0, 60).inputs
        for cut in (1, 13, 42):
            again = Batches(corpus(100, 60, 40, weights=weights), sequence=7, batch=4, seed=3)
            assert torch.equal(again.take(cut, 60 - cut).inputs, whole[cut:])


def test_weighted_sources_keep_their_shares_and_their_own_epochs():
    weights = (6.0, 3.0, 1.0)
    batches = Batches(corpus(71, 71, 71, weights=weights), sequence=7, batch=1, seed=0)
    seen = [batches.take(i, 1).targets[0, 0].item() for i in range(500)]
    source = [(first - 2) // 71 for first in seen]
    for count in (10, 50, 500):
        for number, share in enumerate((0.6, 0.3, 0.1)):
            assert abs(source[:count].count(number) - share * count) <= 1
    for number in range(3):
        own = [first for first, s in zip(seen, source, strict=True) if s == number]
        for epoch in range(len(own) // 10):
            assert sorted(own[10 * epoch : 10 * epoch + 10]) == list(
                range(71 * number + 2, 71 * number + 72, 7)
            )
    with pytest.raises(ConfigError, match=r"data\.weights: 1e-06 is below 1 in 10000"):
        Batches(corpus(71, 71, weights=(1.0, 1e-6)), sequence=7, batch=1, seed=0)


def test_epochs_of_weighted_sources_continue_after_a_period():
    """The end of a period does not restart a source's epoch."""
    batches = Batches(corpus(71, 71, weights=(0.7503, 0.2497)), sequence=7, batch=1, seed=0)
    rows = batches.take(0, 10_100).targets[:, 0]
    second = rows[rows > 72]
    across = second[2490:2500]
    assert len(second) > 2500 > 2497 == (rows[:10_000] > 72).sum()
    assert sorted(across.tolist()) == list(range(73, 143, 7))


def test_a_batch_depends_on_seed_and_number_alone():
    first, second = (Batches(corpus(500), 7, 3, seed=5) for _ in range(2))
    second[40], second[3]
    assert torch.equal(first[17].inputs, second[17].inputs)
    assert not torch.equal(first[17].inputs, Batches(corpus(500), 7, 3, seed=6)[17].inputs)


def test_sequences_with_several_documents_have_document_numbers():
    batches = Batches(documents(5, 3, 20), sequence=9, batch=1, seed=0)
    rows = {int(b.inputs[0, 0]): b.documents for b in (batches[i] for i in range(3))}
    assert rows[0].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 3]]
    assert rows[9] is rows[18] is None
    unmasked = Batches(documents(5, 3, 20), sequence=9, batch=1, seed=0, mask_documents=False)
    assert all(unmasked[i].documents is None for i in range(3))


def test_microbatches_are_the_batch():
    batch = Batches(documents(4, 3, 50), sequence=5, batch=12, seed=0)[0]
    for count in (1, 2, 3, 6):
        microbatches = batch.microbatches(count)
        assert len(microbatches) == count
        for whole, slices in zip(batch, zip(*microbatches, strict=True), strict=True):
            assert whole is not None
            assert torch.equal(torch.cat(slices), whole)
    assert Batches(corpus(90), 5, 6, seed=0)[0].microbatches(3)[2].documents is None


def test_split_holds_out_the_end():
    seen, held_out = corpus(1000).split(sequence=10, fraction=0.1)
    assert (len(seen), held_out.sources[0].read(0, 1)[0]) == (900, 901)
    assert len(corpus(100).split(sequence=10, fraction=0.01)[1]) == 11


def test_split_holds_out_the_end_of_every_source():
    seen, held_out = corpus(1000, 500).split(sequence=10, fraction=0.1)
    assert [len(s) for s in seen.sources] == [900, 450]
    assert [len(s) for s in held_out.sources] == [100, 50]


def test_split_is_at_the_start_of_a_document_if_possible():
    assert len(documents(60, 33, 7).split(2, 0.1)[1]) == 7
    assert len(documents(60, 37, 3).split(2, 0.1)[1]) == 10, "3 is less than half"
    assert len(documents(60, 33, 7).split(6, 0.1)[1]) == 7
    assert len(documents(60, 33, 7).split(8, 0.1)[1]) == 10, "one sequence and its next token"


def test_a_text_that_is_too_short_is_an_error():
    corpus(22).split(sequence=10, fraction=0.05)
    with pytest.raises(DataError, match=r"at least 22 tokens.* but has 21"):
        corpus(21).split(sequence=10, fraction=0.05)


def test_a_validation_share_that_is_too_large_is_an_error():
    message = r"data\.validation=0\.999 leaves 3 of 2700 tokens .* at least 17, .*=0\.98 or less"
    with pytest.raises(DataError, match=message):
        corpus(2700).split(sequence=16, fraction=0.999)
    corpus(2700).split(sequence=16, fraction=0.98)


def test_digests_differ_between_texts(tmp_path):
    a, b = np.zeros(3, dtype=np.uint8), np.ones(3, dtype=np.uint8)
    assert Corpus.of(a).digest == Corpus.of(a.copy()).digest != Corpus.of(b).digest
    assert documents(5, 5).digest != documents(4, 6).digest != documents(10).digest


def test_bytes_are_tokens_and_0_is_the_boundary_token(tmp_path):
    (tmp_path / "a.txt").write_text("Straße\n")
    (tmp_path / "b.txt").write_text("b")
    alone = load(DataConfig(paths=(str(tmp_path / "a.txt"),))).sources[0]
    assert alone.read(0, len(alone)).tolist() == list("Straße\n".encode())
    both = load(DataConfig(paths=(str(tmp_path),))).sources[0]
    assert both.read(0, len(both)).tolist() == [*"Straße\n".encode(), 0, *b"b"]
    assert both.documents(0, len(both)).tolist() == [1] * 8 + [2] * 2


def test_a_vocabulary_that_is_too_small_is_an_error_before_reading(tmp_path):
    (tmp_path / "a.jsonl").write_text("broken")
    with pytest.raises(DataError, match=r"bytes has 256 ids but model\.vocabulary is 255"):
        load(DataConfig(paths=(str(tmp_path),)), 255)


def test_a_source_without_tokens(tmp_path):
    from tokenizers import Tokenizer, models

    (tmp_path / "a.txt").write_text("text")
    Tokenizer(models.BPE({"b": 0}, [])).save(str(tmp_path / "t.json"))
    config = DataConfig(paths=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"a\.txt gives no tokens with"):
        load(config)


def test_broken_rows_are_counted_in_the_log(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{\n')
    paths = (str(tmp_path / "a.jsonl"),)
    assert len(load(DataConfig(paths=paths, skip_broken=True))) == 3
    assert "data: broken rows left out: 1 (1 no JSON), the first is" in caplog.text
    with pytest.raises(DataError, match="line 2"):
        load(DataConfig(paths=paths))


def test_the_home_folder_of_an_unknown_user_is_an_error():
    with pytest.raises(DataError, match=r"data: ~unknown-user/a\.txt is no path"):
        load(DataConfig(paths=("~unknown-user/a.txt",)))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr("manifold_hc.data.progress.LINE_SECONDS", 0)
    (tmp_path / "a.txt").write_text("text" * 500_000)
    screen = Console(file=StringIO(), force_terminal=terminal, width=100)
    load(DataConfig(paths=(str(tmp_path / "a.txt"),)), 256, screen)
    shown = screen.file.getvalue()
    assert ("2.0/2.0 MB" if terminal else "tokenizing: 2 of 2 MB") in shown


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataConfig(sequence=0), "sequence: must be at least 1"),
        (lambda: DataConfig(text_key="\ud800"), "text_key: .* is not valid UTF-8"),
        (lambda: DataConfig(paths=("a", "\udcff")), "paths: .* is not valid UTF-8"),
        (lambda: DataConfig(validation=1.0), "validation: must be between 0 and 1"),
        (lambda: DataConfig(paths=("a", "b"), weights=(1.0,)), "weights: must be one for every"),
        (lambda: DataConfig(paths=("a",), weights=(0.0,)), "weights: must be numbers above 0"),
        (lambda: DataConfig(paths=("a",), weights=(float("nan"),)), "weights: must be numbers"),
    ],
)
def test_invalid_values_are_errors(build, message):
    with pytest.raises(ConfigError, match=message):
        build()

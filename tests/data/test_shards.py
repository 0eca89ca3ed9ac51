import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from manifold_hc.data import DataConfig, load
from manifold_hc.data.shards import ShardFolder, is_shards, write
from manifold_hc.data.tokenizer import tokenizer
from manifold_hc.errors import DataError

TEXTS = ["one document", "another", "x" * 50, "", "the last of them"]


@pytest.fixture
def shards(tmp_path, bpe):
    """A folder of several shards and the tokenizer they were made with."""
    folder, file = tmp_path / "shards", bpe()
    folder.mkdir()
    write(TEXTS, tokenizer(str(file)), folder, limit=20)
    return folder, file


def test_shards_are_the_tokens_that_the_text_gives(shards, tmp_path):
    folder, file = shards
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    mapped = load(DataConfig(paths=(str(folder),)))
    read = load(DataConfig(paths=(str(tmp_path / "text.jsonl"),), tokenizer=str(file)))
    (one,), (other,) = mapped.sources, read.sources
    assert len(ShardFolder(folder).index.shards) > 1
    assert len(one) == len(other) == ShardFolder(folder).index.tokens
    assert np.array_equal(one.read(0, len(one)), other.read(0, len(other)))
    assert np.array_equal(one.documents(0, len(one)), other.documents(0, len(other)))
    assert one.documents(0, len(one)).max() == 4, "the empty one has no token"
    assert mapped.vocabulary == read.vocabulary == 300


def test_ids_are_narrow_and_documents_whole(shards):
    folder, _ = shards
    for entry in ShardFolder(folder).index.shards:
        content = load_file(folder / entry.file)
        assert content["ids"].dtype == np.uint16
        assert content["starts"][0] == 0


def test_a_tokenizer_travels_with_its_shards(shards):
    folder, file = shards
    assert (folder / "tokenizer.json").read_bytes() == file.read_bytes()
    file.unlink()
    assert load(DataConfig(paths=(str(folder),))).vocabulary == 300


def test_shards_of_another_tokenizer(shards, bpe, tmp_path):
    folder, _ = shards
    for other in ("bytes", str(bpe(310))):
        with pytest.raises(DataError, match="was made with another tokenizer"):
            load(DataConfig(paths=(str(folder),), tokenizer=other))
    second = tmp_path / "second"
    second.mkdir()
    write(TEXTS, tokenizer("bytes"), second)
    with pytest.raises(DataError, match=f"{second} was made with another tokenizer"):
        load(DataConfig(paths=(str(folder), str(second))))


def test_one_shard_of_another_tokenizer(shards):
    folder, _ = shards
    file = folder / "shard-00001.safetensors"
    save_file(load_file(file), file, metadata={"tokenizer": "another"})
    with pytest.raises(
        DataError, match=r"shard-00001\.safetensors was made with another tokenizer"
    ):
        load(DataConfig(paths=(str(folder),)))


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "altered", "swapped", "no index", "broken index"]
)
def test_a_damaged_folder(shards, damage):
    folder, _ = shards
    file, index = folder / "shard-00001.safetensors", folder / "shards.json"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "altered":
        content = file.read_bytes()
        file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "swapped":
        shutil.copy(folder / "shard-00000.safetensors", file)
    elif damage == "no index":
        index.unlink()
    else:
        index.write_text(index.read_text()[:40])
    assert is_shards(folder) == (damage != "no index")
    with pytest.raises(
        DataError, match=r"shard-00001|without their shards\.json|shards\.json is damaged"
    ):
        load(DataConfig(paths=(str(folder),)))


def test_checksums_can_be_left_for_later(shards):
    folder, _ = shards
    file = folder / "shard-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert load(DataConfig(paths=(str(folder),), verify=False))


def test_nothing_is_read_but_what_is_asked_for(shards):
    """The source is a map: a stretch costs its own bytes."""
    folder, _ = shards
    source = load(DataConfig(paths=(str(folder),))).sources[0]
    whole = source.read(0, len(source))
    assert np.array_equal(source[15:30].read(2, 9), whole[17:24])
    assert source[15:30].document_start(0) + 15 == int(
        np.searchsorted(source.documents(0, len(source)), source.documents(15, 16)[0] + 1)
    )

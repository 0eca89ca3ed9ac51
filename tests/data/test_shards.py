import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from manifold_hc.data import DataConfig, load
from manifold_hc.data.documents import Skipped
from manifold_hc.data.shard_writer import write
from manifold_hc.data.shards import ShardFolder, is_shard_folder
from manifold_hc.data.tokenizer import tokenizer
from manifold_hc.errors import DataError

TEXTS = ["one document", "another", "x" * 50, "", "the last of them"]


def documents(texts):
    """Documents of one chunk each."""
    return [(text,) for text in texts]


@pytest.fixture
def shards(tmp_path, bpe):
    """A folder of several shards and the tokenizer they were made with."""
    folder, file = tmp_path / "shards", bpe()
    folder.mkdir()
    write(documents(TEXTS), tokenizer(str(file)), folder, limit=20)
    return folder, file


def test_shards_have_the_tokens_of_their_text(shards, tmp_path):
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


def test_shards_have_narrow_ids_and_whole_documents(shards):
    folder, _ = shards
    for entry in ShardFolder(folder).index.shards:
        content = load_file(folder / entry.file)
        assert content["ids"].dtype == np.uint16
        assert content["starts"][0] == 0


def test_shards_contain_their_tokenizer(shards):
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
    write(documents(TEXTS), tokenizer("bytes"), second)
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
    "damage", ["missing", "FIFO", "truncated", "altered", "swapped", "no index", "broken index"]
)
def test_a_damaged_folder(shards, damage):
    folder, _ = shards
    file, index = folder / "shard-00001.safetensors", folder / "shards.json"
    if damage == "missing":
        file.unlink()
    elif damage == "FIFO":
        file.unlink()
        os.mkfifo(file)
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
    assert is_shard_folder(folder) == (damage != "no index")
    with pytest.raises(
        DataError, match=r"shard-00001|without their shards\.json|shards\.json is damaged"
    ):
        load(DataConfig(paths=(str(folder),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": []}, "is damaged: it names no shard"),
        ({"file": "../elsewhere"}, r"names \.\./elsewhere, outside its folder"),
        ({"file": "/dev/zero"}, r"names /dev/zero, outside its folder"),
    ],
)
def test_an_index_with_invalid_shards_is_an_error(shards, change, message):
    folder, _ = shards
    index = json.loads((folder / "shards.json").read_text())
    if "file" in change:
        index["shards"][0] |= change
    else:
        index |= change
    (folder / "shards.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        load(DataConfig(paths=(str(folder),), verify=False))


def test_verify_false_skips_the_checksums(shards):
    folder, _ = shards
    file = folder / "shard-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert load(DataConfig(paths=(str(folder),), verify=False))


def test_a_range_of_a_source_reads_its_own_tokens(shards):
    """Shards are memory-mapped."""
    folder, _ = shards
    source = load(DataConfig(paths=(str(folder),))).sources[0]
    whole = source.read(0, len(source))
    assert np.array_equal(source[15:30].read(2, 9), whole[17:24])
    assert source[15:30].document_start(0) + 15 == int(
        np.searchsorted(source.documents(0, len(source)), source.documents(15, 16)[0] + 1)
    )


@pytest.mark.parametrize("limit", [1, 4, 7, 12, 10**6])
def test_shards_hold_as_many_whole_documents_as_fit(tmp_path, limit, monkeypatch):
    """Including a document in several chunks that turns out to be too long for the shard."""
    monkeypatch.setattr("manifold_hc.data.encoding.BATCH_CHARACTERS", 2)
    texts = ["ab", "c", "defghijklm", "no", "p", "q", "rstuvwxyz"]
    chunks = [tuple(text[i : i + 2] for i in range(0, len(text), 2)) for text in texts]
    index = write(chunks, tokenizer("bytes"), tmp_path, limit)
    ids = [[0] * (number > 0) + list(text.encode()) for number, text in enumerate(texts)]
    wanted: list[list[list[int]]] = [[]]
    for document in ids:
        if wanted[-1] and sum(map(len, wanted[-1])) + len(document) > limit:
            wanted.append([])
        wanted[-1].append(document)
    assert [entry.documents for entry in index.shards] == [len(shard) for shard in wanted]
    for entry, shard in zip(index.shards, wanted, strict=True):
        content = {
            "ids": np.concatenate(shard).astype(np.uint8),
            "starts": np.cumsum([0, *map(len, shard[:-1])], dtype=np.int64),
        }
        assert (tmp_path / entry.file).read_bytes() == save(content, {"tokenizer": "bytes"})
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_texts_without_tokens_are_an_error(tmp_path):
    with pytest.raises(DataError, match="gives no tokens with bytes"):
        write(documents(["", ""]), tokenizer("bytes"), tmp_path)


def test_the_index_counts_broken_rows(tmp_path):
    skipped = Skipped(allowed=True)
    skipped.reasons["no JSON"] = 2
    write(documents(["x"]), tokenizer("bytes"), tmp_path, skipped=skipped)
    assert ShardFolder(tmp_path).index.skipped == {"no JSON": 2}


def test_shards_of_an_earlier_version_load_with_a_warning(shards, caplog):
    folder, _ = shards
    index = folder / "shards.json"
    load(DataConfig(paths=(str(folder),)))
    assert not caplog.records
    content = json.loads(index.read_text())
    assert content.pop("text_as_text") is True
    content.pop("skipped")
    index.write_text(json.dumps(content))
    load(DataConfig(paths=(str(folder),)))
    assert "a text that spells a special token became that token" in caplog.text


def test_texts_get_the_boundary_token_of_the_shards(bpe, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    file = str(bpe(special=("<eos>", "<stop>")))
    folder = tmp_path / "shards"
    folder.mkdir()
    write(documents(["a", "b"]), tokenizer(file, "<stop>"), folder)
    paths = (str(folder), str(tmp_path / "text.jsonl"))
    for named in ("", file):
        one, other = load(DataConfig(paths=paths, tokenizer=named)).sources
        assert one.read(0, 3).tolist() == other.read(0, 3).tolist()
        assert one.read(1, 2)[0] == 1
    with pytest.raises(DataError, match=r"has the id 1 between documents, but data\.boundary"):
        load(DataConfig(paths=paths, boundary="<eos>"))

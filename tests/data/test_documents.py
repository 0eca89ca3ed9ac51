import json

import pyarrow
import pytest
from pyarrow import parquet

from manifold_hc.data.documents import documents
from manifold_hc.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Five documents in three formats, one of them below, and files that are none."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.txt").write_text("first\ntext")
    lines = [json.dumps({"text": text}) for text in ("second", "", "Straße")]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines, ""]) + "\n")
    parquet.write_table(
        pyarrow.table({"text": ["fourth", "fifth"], "id": [1, 2]}), tmp_path / "d.parquet"
    )
    (tmp_path / "notes.csv").write_text("not a text")
    (tmp_path / ".hidden.txt").write_text("hidden")
    return tmp_path


def test_a_folder_gives_all_its_documents_in_order(folder):
    assert list(documents(folder)) == ["first\ntext", "second", "Straße", "fourth", "fifth"]


def test_a_text_file_is_one_document_whatever_its_name(folder):
    assert list(documents(folder / "notes.csv")) == ["not a text"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "line"}', encoding="utf-8-sig")
    assert list(documents(tmp_path)) == ["text", "line"]


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    parquet.write_table(pyarrow.table({"content": ["two"]}), tmp_path / "b.parquet")
    assert list(documents(tmp_path, "content")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: must be an object"),
        ("a.jsonl", b'{"txt": "x"}\n', r"line 1: the key 'text' is missing; there are txt"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: the key 'text' is no text"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', r"line 1: the text is binary"),
        ("a.jsonl", b'{"text": "a\xff"}\n', r"line 1: not valid JSON: it is not UTF-8"),
        ("a.jsonl", b"[" * 200_000, r"line 1: not valid JSON: maximum recursion"),
        ("a.jsonl", b"\n", r"is empty"),
        ("a.txt", bytes(range(256)), r"a\.txt is not UTF-8 text but binary"),
        ("a.txt", b"a\0b", r"a\.txt is not UTF-8 text but binary"),
        ("a.txt", b" \n", r"is empty"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(documents(tmp_path / name))


def test_parquet_without_the_column_or_with_a_hole(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'text' but id"):
        list(documents(tmp_path))
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: 'text' is no text"):
        list(documents(tmp_path))


def test_a_folder_without_texts(tmp_path):
    with pytest.raises(DataError, match=r"is a folder without \.txt"):
        list(documents(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        list(documents(tmp_path / "nowhere"))

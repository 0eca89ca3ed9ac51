import bz2
import codecs
import gzip
import json
import lzma
import sys

import pyarrow
import pytest
from pyarrow import parquet

from manifold_hc.data import documents as documents_module
from manifold_hc.data.documents import Skipped
from manifold_hc.errors import DataError


def documents(path, *arguments):
    """The documents at `path`, each as one text."""
    return ["".join(chunks) for chunks in documents_module.documents(path, *arguments)]


@pytest.fixture
def folder(tmp_path):
    """Five documents in three formats, one of them in a subfolder, and two files to skip."""
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
    assert documents(folder) == ["first\ntext", "second", "Straße", "fourth", "fifth"]


def test_a_text_file_with_any_suffix_is_one_document(folder):
    assert documents(folder / "notes.csv") == ["not a text"]


def test_a_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "line"}', encoding="utf-8-sig")
    assert documents(tmp_path) == ["text", "line"]


def test_text_key_selects_key_and_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    parquet.write_table(pyarrow.table({"content": ["two"]}), tmp_path / "b.parquet")
    assert documents(tmp_path, "content") == ["one", "two"]


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
        ("a.txt", bytes(range(256)), r"a\.txt, line 1: not UTF-8 text: .* 0 is 0x00; .* binary"),
        ("a.txt", b"a\n\0b", r"a\.txt, line 2: not UTF-8 text: .* offset 2 is 0x00; .* binary"),
        ("a.txt", "a\né".encode("latin1"), r"line 2: .* offset 2 is 0xe9; .*-f latin1 -t utf-8"),
        ("a.txt", "a".encode("utf-16"), r"line 1: .* iconv -f utf-16 -t utf-8"),
        ("a.txt", b" \n", r"is empty"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_an_unreadable_file_is_an_error_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / name)


def test_parquet_without_the_column_or_with_a_null(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'text' but id"):
        documents(tmp_path)
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: 'text' is no text"):
        documents(tmp_path)


def test_a_row_of_parquet_that_is_not_utf8(tmp_path):
    column = pyarrow.array([b"x", b"\xff", b"y"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: 'text' is no text"):
        documents(tmp_path)
    assert documents(tmp_path, "text", Skipped(allowed=True)) == ["x", "y"]


def test_a_folder_without_texts(tmp_path):
    with pytest.raises(DataError, match=r"is a folder without \.txt"):
        documents(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        documents(tmp_path / "nowhere")


def test_suffixes_are_case_insensitive(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "one"}\n')
    (tmp_path / "b.TXT").write_text("two")
    (tmp_path / "c.Parquet").touch()
    parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "c.Parquet")
    assert documents(tmp_path) == ["one", "two", "three"]
    assert documents(tmp_path / "A.JSONL") == ["one"]


def test_compressed_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "b.TXT.BZ2").write_bytes(bz2.compress(b"three"))
    (tmp_path / "c.ndjson.xz").write_bytes(lzma.compress(b'{"text": "four"}'))
    assert documents(tmp_path) == ["one", "two", "three", "four"]
    (tmp_path / "book.gz").write_bytes(gzip.compress("Straße".encode()))
    assert documents(tmp_path / "book.gz") == ["Straße"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}' * 99)[:-30], "it cannot be unpacked"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-30], "it cannot be unpacked"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"a\0b"), r"a\.txt\.gz, line 1: not UTF-8 text: .* binary"),
        ("a.parquet.gz", b"", r"is Parquet inside \.gz, which is not read; unpack it"),
    ],
    ids=["cut gzip", "cut xz", "no gzip", "binary", "Parquet"],
)
def test_compressed_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=message):
            documents(path)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python reads .zst")
def test_an_unsupported_compression_is_an_error(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    with pytest.raises(DataError, match=r"packed as \.zst, which this Python does not read"):
        documents(tmp_path)


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "x.txt").write_text("linked")
    source = tmp_path / "source"
    (source / "z").mkdir(parents=True)
    (source / "z" / "y.txt").write_text("own")
    (source / "0").symlink_to(source / "z")
    (source / "a").symlink_to(tmp_path / "outside")
    (source / "z" / "loop").symlink_to(source)
    assert documents(source) == ["linked", "own"]


def test_skipped_files_of_a_folder_are_counted_in_the_log(folder, caplog):
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "more.CSV").touch()
    (folder / "README").touch()
    documents(folder)
    assert caplog.messages == [
        f"data: {folder}: 3 files are read, 5 are left out: "
        "2 *.csv, 1 hidden, 1 without a suffix, 1 broken links"
    ]


def test_a_file_read_as_plain_text_is_named(folder, caplog):
    with caplog.at_level("INFO", "manifold_hc"):
        documents(folder / "notes.csv")
    assert "notes.csv is read as plain text, one document" in caplog.text
    for name in ("tables.csv.gz", "book.GZ"):
        (folder / name).write_bytes(gzip.compress(b"text"))
    caplog.clear()
    with caplog.at_level("INFO", "manifold_hc"):
        for name in ("tables.csv.gz", "book.GZ", "c.jsonl"):
            documents(folder / name)
    assert [record.args for record in caplog.records] == [(folder / "tables.csv.gz",)]


def test_a_path_that_is_not_utf8_is_an_error(folder):
    with pytest.raises(DataError, match=r"the path .* is not valid UTF-8; rename the file"):
        documents(folder / "x\udcff.txt")


def test_a_long_text_is_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "CHUNK", 7)
    text = "  \n" * 9 + "Straße, 漢字 und 😀. " * 9
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig")
    (document,) = [list(chunks) for chunks in documents_module.documents(tmp_path / "a.txt")]
    assert "".join(document) == text
    assert len(document) > 9
    for mark in (b"", codecs.BOM_UTF8):
        for bad, offset in ((b"\xc3", 36), (b"\xc3 more", 36), ("é\xff".encode() + b"\xff\n", 40)):
            (tmp_path / "a.txt").write_bytes(mark + b"tex\n" * 9 + bad)
            said = f"line 10: .* offset {offset + len(mark)} is 0x"
            with pytest.raises(DataError, match=said):
                documents(tmp_path / "a.txt")


def test_errors_name_the_options_of_both_commands(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": "x"}')
    with pytest.raises(DataError, match=r"see data\.text_key \(mhc tokenize --text-key\)") as error:
        documents(tmp_path / "a.jsonl")
    assert "data.skip_broken=true (mhc tokenize --skip-broken) leaves it out" in str(error.value)
    (tmp_path / "empty.txt").touch()
    for name in ("empty.txt", "nowhere.txt"):
        with pytest.raises(DataError, match=r"is empty|does not exist") as error:
            documents(tmp_path / name)
        assert "--data" not in str(error.value)


def test_json_that_msgspec_refuses_is_read_by_python(tmp_path):
    whole = f'{{"text": "one", "other\\ud800": "\\udc00", "score": NaN, "id": {"9" * 5000}}}'
    lines = [whole, '{"text": "a\\ud800b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 2: the text has half a surrogate pair"):
        documents(tmp_path)
    skipped = Skipped(allowed=True)
    assert documents(tmp_path, "text", skipped) == ["one"]


BROKEN = [
    ('{"text": null}', "without a text"),
    ('{"text": "a\\u0000b"}', "binary"),
    ('{"text": "a\\ud800b"}', "with half a surrogate pair"),
    ('{"text": "cut', "no JSON"),
    ('{"title": "x"}', "without a text"),
    ("[1]", "no objects"),
]


def test_broken_rows_can_be_skipped(tmp_path):
    rows = [row for line, _ in BROKEN for row in ('{"text": "whole"}', line)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    table = pyarrow.table({"text": ["x", None, "a\0b", "y"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_text("last")
    skipped = Skipped(allowed=True)
    assert documents(tmp_path, "text", skipped) == ["whole"] * 6 + ["x", "y", "last"]
    wanted = {"without a text": 3, "binary": 2, "no JSON": 1, "no objects": 1, "not UTF-8": 1}
    assert skipped.reasons == wanted | {"with half a surrogate pair": 1}
    assert str(skipped).startswith("broken rows left out: 9 (3 without a text, 2 binary")
    assert str(skipped).endswith(f"the first is {tmp_path / 'a.jsonl'}, line 2")
    with pytest.raises(DataError, match="line 2: the key 'text' is no text"):
        documents(tmp_path)


def test_a_source_with_only_broken_rows_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match="has no row that can be read: broken rows left out: 2"):
        documents(tmp_path, "text", Skipped(allowed=True))


def test_progress_reports_every_byte(folder):
    reported = []
    (folder / "broken.txt").write_bytes(b"\xff" * 99)
    documents(folder, "text", Skipped(allowed=True), reported.append)
    files = ("below/a.txt", "broken.txt", "c.jsonl", "d.parquet")
    assert sum(reported) == pytest.approx(sum((folder / f).stat().st_size for f in files), abs=2)

import sys

import numpy as np
import pytest

from manifold_hc.data import corpus
from manifold_hc.errors import DataError


def test_a_files_bytes_are_the_tokens(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("Straße\n".encode())
    assert corpus.load(str(file)).tolist() == list("Straße\n".encode())


def test_documentation_is_collected_once(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "cache_folder", lambda: tmp_path / "cache")
    text = corpus.documentation()
    assert 800_000 < len(text) < 4_000_000
    assert b"assert_stmt" in text
    modules = set(sys.modules)
    monkeypatch.setattr(corpus, "_topics", None)
    assert corpus.documentation() == text
    assert "antigravity" not in modules, "sources are read, never imported"


def test_a_read_only_cache_is_no_failure(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(corpus, "cache_folder", lambda: tmp_path / "file" / "cache")
    monkeypatch.setattr(corpus, "_docstrings", lambda: ["text"])
    assert corpus.documentation().endswith(b"text")
    assert "not cached" in caplog.text


def test_fingerprints_tell_texts_apart():
    a, b = np.zeros(3, dtype=np.uint8), np.ones(3, dtype=np.uint8)
    assert corpus.fingerprint(a) == corpus.fingerprint(a.copy()) != corpus.fingerprint(b)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x00text", "binary"),
        (b"\xff\xfe\x00", "binary"),
    ],
)
def test_data_that_is_no_text(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        corpus.load(str(file))
    with pytest.raises(DataError, match="is a folder"):
        corpus.load(str(tmp_path))


def test_real_text(test_data):
    tokens = corpus.load(str(test_data / "train" / "tinyshakespeare.txt"))
    assert len(tokens) == 1_115_394

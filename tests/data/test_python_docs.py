import sys

from manifold_hc.data import python_docs as module
from manifold_hc.data.python_docs import python_docs


def test_python_docs_are_collected_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    text = python_docs()
    assert 800_000 < len(text) < 4_000_000
    assert "assert_stmt" in text
    modules = set(sys.modules)
    monkeypatch.setattr(module, "_topics", None)
    assert python_docs() == text
    assert "antigravity" not in modules, "sources are read, never imported"


def test_an_unwritable_cache_logs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "file" / "cache")
    monkeypatch.setattr(module, "_docstrings", lambda: ["text"])
    assert python_docs().endswith("text")
    assert "not cached" in caplog.text

import sys

from manifold_hc.data import python_docs as place
from manifold_hc.data.python_docs import documentation


def test_documentation_is_collected_once(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "cache_folder", lambda: tmp_path / "cache")
    text = documentation()
    assert 800_000 < len(text) < 4_000_000
    assert "assert_stmt" in text
    modules = set(sys.modules)
    monkeypatch.setattr(place, "_topics", None)
    assert documentation() == text
    assert "antigravity" not in modules, "sources are read, never imported"


def test_a_read_only_cache_is_no_failure(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(place, "cache_folder", lambda: tmp_path / "file" / "cache")
    monkeypatch.setattr(place, "_docstrings", lambda: ["text"])
    assert documentation().endswith("text")
    assert "not cached" in caplog.text

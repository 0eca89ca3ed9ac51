import sys
from importlib import import_module

import pytest

from manifold_hc.errors import MissingExtraError


def test_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("manifold_hc.extras.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "manifold_hc.interop.torchtitan", raising=False)
    with pytest.raises(MissingExtraError, match=r"needs torchtitan; .*'manifold-hc\[torchtitan\]'"):
        import_module("manifold_hc.interop.torchtitan")

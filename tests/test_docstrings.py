"""Docstrings of the public names: every example runs, and every function has its sections."""

import doctest

import pytest
import torch

import manifold_hc as mhc
from manifold_hc import functional

FUNCTIONS = ("expand", "sinkhorn", "coefficients", "hc_coefficients", "read", "write", "collapse")

PUBLIC = {
    **{f"functional.{name}": getattr(functional, name) for name in FUNCTIONS},
    "warmup": mhc.warmup,
    "convert": mhc.convert,
    "Connection": mhc.Connection,
    "ConnectionConfig": mhc.ConnectionConfig,
    "Stack": mhc.Stack,
}

SECTIONS = {
    "warmup": ("Args:", "Returns:", "Raises:"),
    "Connection": ("Args:", "Raises:", "arXiv"),
    "ConnectionConfig": ("Attributes:", "Raises:", "arXiv"),
    "Stack": ("Args:", "Raises:", "mHC, section"),
}


@pytest.mark.parametrize("name", ["manifold_hc", *PUBLIC])
def test_examples_run(name):
    """In one namespace with `torch` and `functional`, which the examples take as imported."""
    names = {"torch": torch, "functional": functional}
    documented = mhc if name == "manifold_hc" else PUBLIC[name]
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, name, globs=names)
    assert example.examples
    report = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not failed, "".join(report)


@pytest.mark.parametrize("name", PUBLIC)
def test_sections(name):
    wanted = SECTIONS.get(name, ("Args:", "Returns:", "Raises:", "arXiv"))
    assert [section for section in wanted if section not in PUBLIC[name].__doc__] == []


@pytest.mark.parametrize("kind", [mhc.Connection, mhc.Stack])
def test_sections_of_forward(kind):
    wanted = ("Args:", "Returns:", "Raises:")
    assert [section for section in wanted if section not in kind.forward.__doc__] == []

"""Docstrings of the public functions: every example runs, and every function has its sections."""

import doctest

import pytest
import torch

from manifold_hc import functional

FUNCTIONS = ("expand", "sinkhorn", "coefficients", "hc_coefficients", "read", "write", "collapse")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name):
    """In one namespace with `torch` and `functional`, which the examples take as imported."""
    names = {"torch": torch, "functional": functional}
    (example,) = doctest.DocTestFinder(recurse=False).find(
        getattr(functional, name), name, globs=names
    )
    assert example.examples
    report = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not failed, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sections(name):
    text = getattr(functional, name).__doc__
    assert [section for section in ("Args:", "Returns:", "Raises:") if section not in text] == []
    assert "arXiv" in text

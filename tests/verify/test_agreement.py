"""Parity with every installed library, both directions of conversion, and the page about it."""

from dataclasses import replace

import pytest
import torch

from manifold_hc.verify import agreement, parity
from manifold_hc.verify.agreement import Agreement, compare_library
from manifold_hc.verify.agreement_page import by_hand, page
from manifold_hc.verify.references import GLM5, LIGER, TILE_KERNELS, TRANSFORMERS
from tests.verify.test_references import needs_tile_kernels

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "library",
    [TRANSFORMERS, GLM5, pytest.param(TILE_KERNELS, marks=needs_tile_kernels)],
    ids=lambda library: library.part,
)
def test_a_library_agrees(library):
    found = compare_library(library)
    assert found.ok
    assert max(found.outputs, found.gradients) < 1e-13
    assert found.streams == (2, 3, 4, 8)
    assert (found.constraint, found.swap) == ("sinkhorn", False)
    assert found.precision == "float64"


@pytest.mark.slow
def test_interpreted_liger_kernel_agrees():
    pytest.importorskip("liger_kernel")
    found = compare_library(LIGER, streams=(2, 3, 4))
    assert found.ok
    assert max(found.outputs, found.gradients) < 3e-6
    assert found.streams == (2, 4)
    assert (found.constraint, found.swap) == ("sinkhorn_columns", True)


@pytest.mark.parametrize(
    ("quantity", "changed"),
    [
        ("outputs", lambda new: new * (1 + 1e-6)),
        ("gradients", lambda new: new.detach() + 1.001 * (new - new.detach())),
    ],
)
def test_a_library_that_is_off_does_not_agree(quantity, changed):
    def build(config, channels):
        code = TRANSFORMERS.build(config, channels)

        def sublayer(*arguments):
            found = code.sublayer(*arguments)
            return {**found, "new": changed(found["new"])}

        return replace(code, sublayer=sublayer)

    found = compare_library(replace(TRANSFORMERS, build=build))
    assert not found.ok
    assert getattr(found, quantity) > 1e-7
    if quantity == "gradients":
        assert found.outputs < 1e-13


def test_another_direction_is_measured():
    """A library that mixes untransposed and ends on comb's columns is sinkhorn_columns, swapped."""

    def build(config, channels):
        code = TRANSFORMERS.build(config, channels)

        def sublayer(index, tensors, x, y):
            found = code.sublayer(index, tensors, x, y)
            n = x.shape[1]
            # With y = 0 and the unit vectors as streams the new streams are res itself.
            eye = torch.eye(n, channels, dtype=x.dtype).expand(len(x), n, channels)
            res = code.sublayer(index, {**tensors, "fn": 0 * tensors["fn"]}, eye, 0 * y)["new"]
            return {**found, "new": res[..., :n].mT @ x + found["post"][..., None] * y[:, None]}

        return replace(code, sublayer=sublayer)

    stack = parity.random_stack(agreement._config(TRANSFORMERS, 4))
    with torch.no_grad():
        stack.connections[0].maps.phi[8:] = 0
    library = replace(TRANSFORMERS, build=build)
    model = parity.random_model(library, stack)
    (theirs,) = parity.run_models(library, [model])
    assert agreement._measure_order(library, stack, model, theirs) == ("sinkhorn_columns", True)
    theirs.outputs[1][0, 0, 0] += 1
    assert agreement._measure_order(library, stack, model, theirs) == ("unknown", None)


def test_the_page_has_every_library():
    row = Agreement(
        "mine", "1.2", "all", "paper", "sinkhorn", True, (2, 4), "float64", 1e-15, 2e-15, 1e-10
    )
    text = page([row], [TILE_KERNELS], "Here.")
    assert "| mine 1.2 | all | paper | sinkhorn | transposed | 2, 4 | 1e-15 | 2e-15 |" in text
    assert "Not installed here" in text
    assert "pip install --no-deps tile-kernels" in text
    for peer in by_hand()["peer"]:
        assert f"| {peer['name']} |" in text
    assert "{" not in text.replace("{i", "")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in tables} == {9, 7}

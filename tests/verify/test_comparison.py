"""Differences are found in every detail, named by sublayer and tensor, and explained."""

import pytest
import torch

from manifold_hc.verify import compare
from manifold_hc.verify.observation import EXIT
from manifold_hc.verify.recorded import Recording
from tests.verify.changed import recording
from tests.verify.conftest import build

FITS = "; fits all 4 sublayers and the exit"

PLANTED = {
    "direction": (
        {"direct": True},
        "res is mixed in the other direction: res[o, i] = comb[o, i]",
    ),
    "order": ({"rows_last": True}, "the Sinkhorn iterations end on the rows of comb"),
    "place": ({"outside": True}, "the epsilon of the norm is outside the root"),
    "norm": ({"norm_eps": 1e-5}, "the epsilon of the norm is 1e-05"),
    "softmax": ({"softmax_eps": 0.0}, "the epsilon added after the softmax of comb is absent"),
    "pre": ({"pre_eps": 0.0}, "the epsilon added to pre is absent"),
    "factor": ({"factor": 1}, "the factor of post is 1"),
    "exit": ({"exit": "mean"}, "the exit is the mean of the streams"),
    "iterations": ({"iterations": 10}, "there are 10 Sinkhorn iterations"),
    "pair": (
        {"direct": True, "rows_last": True},
        "res is mixed in the other direction: res[o, i] = comb[o, i], and the Sinkhorn "
        "iterations end on the rows of comb",
    ),
}


def report(stack, tensors):
    return compare(stack, Recording(tensors, stack, "mine"))


def test_an_equal_implementation_agrees(stack):
    found = report(stack, recording(stack))
    assert found.ok
    assert found.precision == "float64"
    assert [one.tensor for one in found.compared] == ["u", "new"] * 4 + ["h"]
    assert max(one.error for one in found.compared) < 1e-13
    assert found.diagnosis is None


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_is_explained(stack, name):
    changes, sentence = PLANTED[name]
    found = report(stack, recording(stack, **changes))
    assert not found.ok
    assert found.diagnosis.verdict == "convention"
    assert found.diagnosis.sentences[0] == sentence + FITS
    assert found.differing[0].index == (EXIT if name == "exit" else 0)


@pytest.mark.parametrize("name", ["direction", "factor", "exit", "order"])
def test_a_planted_change_is_explained_in_float32(stack, name):
    changes, sentence = PLANTED[name]
    tensors = recording(stack, dtype=torch.float32, compute=torch.float32, **changes)
    found = report(stack, tensors)
    assert found.precision == "float32"
    assert found.diagnosis.sentences[0] == sentence + FITS


@pytest.mark.parametrize(
    ("row", "tensor", "rows"),
    [(1, "u", "pre"), (6, "new", "post or res"), (13, "new", "post or res")],
)
def test_one_entry_of_one_middle_sublayer_is_found(row, tensor, rows):
    stack, other = build(std=0.5), build(std=0.5)
    with torch.no_grad():
        other.connections[2].maps.phi[row, 5] += 1e-3
    found = report(stack, recording(other))
    (one,) = found.differing
    assert (one.index, one.tensor) == (2, tensor)
    assert one.tolerance == 1e-10
    assert found.diagnosis.verdict == "weights"
    first, second = found.diagnosis.sentences
    assert first == (
        "sublayer 2 alone differs and 4 of 5 agree: the weights differ, not the convention"
    )
    assert second == f"look at the {rows} rows of phi and bias, and at alpha, of sublayer 2"


def test_one_entry_is_found_in_a_float32_recording():
    stack, other = build(std=0.5), build(std=0.5)
    with torch.no_grad():
        other.connections[2].maps.phi[1, 5] += 1e-3
    tensors = recording(other, dtype=torch.float32, compute=torch.float32)
    (one,) = report(stack, tensors).differing
    assert (one.index, one.tensor) == (2, "u")
    assert report(other, tensors).ok


def test_a_changed_exit_is_named(stack):
    other = build()
    with torch.no_grad():
        other.exit.bias[1] += 1e-3
    found = report(stack, recording(other))
    assert [(one.index, one.tensor) for one in found.differing] == [(EXIT, "h")]
    assert found.diagnosis.sentences[0].startswith("the exit alone differs and 4 of 5 agree")
    assert found.diagnosis.sentences[1] == "look at phi, bias and alpha of the exit"


def test_a_convention_of_one_sublayer_is_named_with_it(stack):
    tensors, other = recording(stack), recording(stack, direct=True)
    tensors["sublayers.1.new"] = other["sublayers.1.new"]
    found = report(stack, tensors)
    assert [one.index for one in found.differing] == [1]
    assert found.diagnosis.verdict == "weights"
    assert found.diagnosis.sentences[-1] == (
        "res is mixed in the other direction: res[o, i] = comb[o, i]; "
        "would fit sublayer 1 too, but no other sublayer"
    )


def with_exit(tensors, other):
    return tensors | {name: other[name] for name in other if name.startswith("exit")}


def test_an_exit_in_the_stack_s_own_convention_is_told_from_the_sublayers(stack):
    found = report(stack, with_exit(recording(stack, norm_eps=1e-5), recording(stack)))
    assert found.diagnosis.verdict == "convention"
    assert found.diagnosis.sentences == [
        "the epsilon of the norm is 1e-05; fits all 4 sublayers, but not the exit",
        "the exit agrees as it is",
    ]


def test_an_exit_in_a_third_convention_is_explained_by_itself(stack):
    tensors = with_exit(recording(stack, norm_eps=1e-5), recording(stack, norm_eps=1e-4))
    assert report(stack, tensors).diagnosis.sentences == [
        "the epsilon of the norm is 1e-05; fits all 4 sublayers, but not the exit",
        "the epsilon of the norm is 0.0001; fits the exit, but not the sublayers",
    ]


def test_an_exit_that_no_convention_explains_is_told_from_the_sublayers(stack):
    tensors = recording(stack, norm_eps=1e-5)
    tensors["exit.h"] = tensors["exit.h"] * 1.01
    assert report(stack, tensors).diagnosis.sentences == [
        "the epsilon of the norm is 1e-05; fits all 4 sublayers, but not the exit",
        "no convention fits the exit",
    ]


def test_the_closest_convention_is_named_with_the_sublayers_that_it_fits(stack):
    tensors = recording(stack, norm_eps=1e-5)
    tensors["sublayers.2.new"] *= 1.01
    found = report(stack, tensors)
    assert found.diagnosis.verdict == "unknown"
    first, second, third = found.diagnosis.sentences
    assert first == "no convention fits all 4 sublayers and the exit"
    assert second.startswith(
        "the epsilon of the norm is 1e-05; fits sublayer 0 and sublayer 1, but on sublayer 2 the "
        "error that is left is "
    )
    assert third == ("the epsilon of the norm is 1e-05; fits the exit, but not the sublayers")


def test_what_no_convention_explains_is_said(stack):
    tensors = recording(stack)
    for index in range(4):
        tensors[f"sublayers.{index}.new"] *= 1.01
    found = report(stack, tensors)
    assert found.diagnosis.verdict == "unknown"
    assert found.diagnosis.sentences[0] == "no convention fits all 4 sublayers and the exit"
    assert found.diagnosis.sentences[1].startswith("closest on sublayer 0: ")


def test_float64_tensors_of_a_float32_computation_are_judged_as_float32(stack):
    found = report(stack, recording(stack, compute=torch.float32))
    assert found.ok
    assert found.precision == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_recordings_have_their_own_tolerance(stack, dtype):
    assert report(stack, recording(stack, dtype=dtype, compute=torch.float32)).ok
    found = report(stack, recording(stack, dtype=dtype, factor=1))
    assert found.diagnosis.sentences[0] == PLANTED["factor"][1] + FITS


def test_connections_without_a_family_are_compared_too():
    stack = build(constraint="kronecker", exit="mean")
    other = build(constraint="kronecker", exit="mean")
    with torch.no_grad():
        other.connections[1].maps.bias[0] += 1e-3
    from manifold_hc.verify.forward import StackSource
    from manifold_hc.verify.observation import Inputs

    inputs = Inputs(4, 4, 8)
    assert compare(stack, StackSource(stack, inputs, "same")).ok
    found = compare(stack, StackSource(other, inputs, "other"))
    assert {one.index for one in found.differing} == {1}
    assert found.diagnosis.sentences[1].startswith("look at the pre rows")


def test_single_pass_names_the_sublayer_whose_pre_is_read():
    stack, other = (build(numerics="deepseek_v41") for _ in range(2))
    with torch.no_grad():
        other.connections[1].maps.phi[0, 0] += 1e-3
    from manifold_hc.verify.forward import StackSource
    from manifold_hc.verify.observation import Inputs

    class OnlyInputs(StackSource):
        def observations(self):
            for one in super().observations():
                for name in ("pre", "post", "res"):
                    one.results.pop(name, None)
                yield one

    assert compare(stack, OnlyInputs(stack, Inputs(4, 4, 8), "same")).ok
    found = compare(stack, OnlyInputs(other, Inputs(4, 4, 8), "other"))
    assert [(one.index, one.tensor) for one in found.differing] == [(2, "u")]
    assert found.diagnosis.sentences[1].endswith("at alpha, of sublayer 1")


def test_an_exit_without_parameters_is_not_explained_by_a_learned_one(stack):
    mean = build(exit="mean")
    tensors = {name: t for name, t in recording(stack).items() if name.startswith("exit")}
    tensors["exit.h"] = torch.randn_like(tensors["exit.h"])
    found = report(mean, tensors)
    assert found.diagnosis.verdict == "unknown"
    tensors["exit.h"] = tensors["exit.x"].sum(1)
    assert report(mean, tensors).diagnosis.sentences[0].startswith("the exit is the sum")

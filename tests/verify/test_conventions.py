"""The second statement of the equations equals the reference, and its fields what tests change."""

import pytest
import torch

import manifold_hc as mhc
from manifold_hc import reference
from manifold_hc.numerics import preset
from manifold_hc.verify import conventions
from manifold_hc.verify.conventions import project
from manifold_hc.verify.evidence import weights_of
from manifold_hc.verify.observation import EXIT, Inputs
from manifold_hc.verify.search import _judge, changes
from tests.verify.conftest import build


@pytest.mark.parametrize("constraint", ["sinkhorn", "sinkhorn_columns"])
@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4", "deepseek_v41", "glm5"])
def test_presets_equal_the_reference(numerics, constraint):
    stack = build(numerics=numerics, constraint=constraint, iterations=7).double()
    convention = conventions.of(stack.config)
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    weights = weights_of(stack, 1)
    found = convention.maps(project(x, weights), weights)
    wanted = reference.coefficients(x, *weights, 7, constraint, preset(numerics))
    for one, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-14)
    if stack.exit is not None:
        own = weights_of(stack, EXIT)
        torch.testing.assert_close(
            convention.exit_weights(project(x, own), own),
            reference.exit_coefficients(x, *own, preset(numerics)),
        )


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "hc"},
        {"constraint": "exact"},
        {"dynamic": False},
        {"disable": ("res",)},
    ],
)
def test_other_connections_have_no_convention(config):
    assert conventions.of(mhc.ConnectionConfig(**config)) is None


@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
def test_every_change_changes_the_convention(numerics):
    base = conventions.of(mhc.ConnectionConfig(numerics=numerics))
    found = changes(base)
    assert len({change.sentence for change in found}) == len(found)
    assert all(change.apply(base) != base for change in found)
    fields = set().union(*(change.fields for change in found))
    assert fields == set(base.__dataclass_fields__)


def test_two_values_of_one_detail_are_no_pair():
    base = conventions.of(mhc.ConnectionConfig(numerics="deepseek_v4"))
    first, second = (c for c in changes(base) if c.fields == {"iterations"} and "10" in c.sentence)
    assert _judge(base, (first, second), []) is None
    assert _judge(base, (first, changes(base)[0]), []).fits


def test_random_tokens_have_small_and_large_norms():
    x, y = Inputs(tokens=8, channels=64).of(3)
    rms = x.square().mean((1, 2)).sqrt()
    assert rms[0] == pytest.approx(0.01, rel=0.3)
    assert rms[-1] == pytest.approx(10, rel=0.3)
    assert not torch.equal(x, Inputs(tokens=8, channels=64).of(2).x)
    assert not torch.equal(x, Inputs(tokens=8, channels=64, seed=1).of(3).x)
    assert torch.equal(y, Inputs(tokens=8, channels=64).of(3).y)

import json

import pytest

from tests import golden


@pytest.mark.parametrize("kind", golden.KINDS)
def test_losses_are_the_recorded_ones_and_the_same_every_time(kind, tmp_path):
    recorded = json.loads(golden.FILE.read_text())[kind]
    first = golden.losses(kind, tmp_path / "first")
    assert len(first) == 20
    assert first == pytest.approx(recorded, rel=1e-3)
    assert golden.losses(kind, tmp_path / "second") == first


def test_the_kinds_start_with_equal_losses_and_then_differ():
    recorded = json.loads(golden.FILE.read_text())
    assert recorded["mhc"][0] == pytest.approx(recorded["residual"][0], rel=1e-6)
    assert recorded["hc"][0] == pytest.approx(recorded["residual"][0], rel=1e-6)
    assert recorded["residual"][-1] < 0.8 * recorded["residual"][0]
    assert abs(recorded["mhc"][-1] - recorded["residual"][-1]) > 1e-3

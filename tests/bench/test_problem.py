"""Bytes of the paper's accounting, computed by hand."""

import pytest

from manifold_hc.bench.measure import timing
from manifold_hc.bench.problem import Problem
from manifold_hc.errors import ConfigError


def test_elements_of_four_streams():
    assert Problem(streams=4).bound_elements == (18, 23)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_forward_and_backward_are_nine_n_plus_five(n):
    assert sum(Problem(streams=n).bound_elements) == 9 * n + 5


def test_bytes_of_the_default_size():
    """2048 tokens, C = 1280: 2 621 440 elements a stream; 18 and 23 of them."""
    assert Problem().bound_bytes == (188_743_680, 241_172_480)
    assert Problem(dtype="bfloat16").bound_bytes == (94_371_840, 120_586_240)
    assert Problem().stream_bytes == 41_943_040
    assert Problem(dtype="bfloat16").stream_bytes == 20_971_520


def test_a_copy_counts_reads_and_writes(monkeypatch):
    seconds = iter([[5.0], [2.0], [1.0]])
    monkeypatch.setattr(timing, "call_seconds", lambda device, copy: next(seconds))
    assert (
        timing.copy_bandwidth("cpu", size=1000, repeats=3) == 1000
    )  # 2 x 1000 bytes in the median 2 s


@pytest.mark.usefixtures("unchecked")
def test_invalid_problems():
    for wrong in ({"tokens": 0}, {"dtype": "int8"}, {"numerics": "other"}):
        with pytest.raises(ConfigError):
            Problem(**wrong)

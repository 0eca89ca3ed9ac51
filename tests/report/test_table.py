"""Intervals of a comparison, against published quantiles of Student's t."""

import math
from statistics import NormalDist

import pytest

from manifold_hc.report import table


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.70620474), (2, 4.30265273), (3, 3.18244631), (4, 2.77644511), (9, 2.26215716),
     (10, 2.22813885), (11, 2.20098516), (20, 2.08596345), (29, 2.04522964), (30, 2.04227246),
     (100, 1.98397152), (1000, 1.96233908)],
)  # fmt: skip
def test_quantiles_of_students_t(freedom, quantile):
    assert table.student(freedom) == pytest.approx(quantile, abs=1e-8)


def test_students_t_falls_to_the_normal_distribution():
    found = [table.student(freedom) for freedom in (*range(1, 60), 5000)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-3)


def test_the_interval_of_eleven_seeds():
    values = [float(value) for value in range(11)]
    assert table._interval(values) == pytest.approx(2.22813885 * math.sqrt(11) / math.sqrt(11))
    assert math.isnan(table._interval(values[:1]))

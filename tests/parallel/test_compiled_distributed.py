"""Compiled branches in distributed runs give the same losses."""

from dataclasses import replace

import pytest

from tests.parallel.layouts import distributed, figures, layouts, run, with_microbatches
from tests.parallel.ranks import run_on_ranks
from tests.training import runs

EVERYTHING = runs.with_experts(runs.config(recompute=2, accumulate=2))
WIDE = [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}, {"shard": 2, "experts": 2}]


@pytest.mark.parametrize("degrees", layouts([], WIDE))
def test_every_axis_compiled(degrees, tmp_path):
    base = replace(EVERYTHING, training=replace(EVERYTHING.training, compile=True))
    config = distributed(base, **degrees)
    run_on_ranks(2, run, config, tmp_path / "together")
    run(with_microbatches(EVERYTHING, 2 * config.parallel.dp_size), tmp_path / "alone")
    found, wanted = figures(tmp_path / "together"), figures(tmp_path / "alone")
    assert len(found["losses"]) == 20
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["validation"] == pytest.approx(wanted["validation"], rel=1e-5)

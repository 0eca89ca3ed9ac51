"""The claim of the demo, with its configuration and fewer steps."""

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig, load
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.training import OptimizerConfig, RunConfig, RunFolder, TrainingConfig, train


def test_hc_amplifies_and_mhc_does_not(tmp_path):
    largest = {}
    for kind in ("hc", "mhc"):
        folder = RunFolder(tmp_path / kind)
        folder.path.mkdir()
        config = RunConfig(
            connection=ConnectionConfig(kind=kind),
            optimizer=OptimizerConfig(schedule="constant"),
            training=TrainingConfig(steps=60, validation_batches=1),
        )
        train(config, load(DataConfig()), folder, [GainMonitor])
        gains = [record for record in folder.metrics() if record["event"] == "gain"]
        largest[kind] = tuple(
            max(record[key] for record in gains) for key in ("gain_forward", "gain_backward")
        )
    assert min(largest["hc"]) > 10
    assert max(largest["mhc"]) < 2

"""The golden run: 20 steps in float32 on a text generated from a seed, for every kind.

`python -m tests.golden` (or `make golden`) is the only thing that rewrites golden.json.
"""

import json
from pathlib import Path

import numpy as np

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import Corpus, DataConfig
from manifold_hc.models import AttentionConfig, DecoderConfig
from manifold_hc.training import (
    OptimizerConfig,
    RunConfig,
    RunFolder,
    TrainingConfig,
    train,
)

FILE = Path(__file__).with_name("golden.json")
KINDS = ("residual", "hc", "mhc")


def config(kind: str) -> RunConfig:
    return RunConfig(
        model=DecoderConfig(
            channels=32,
            blocks=2,
            feed_forward=64,
            attention=AttentionConfig(heads=2, head_size=16, rotary_size=8, latent_size=16),
        ),
        connection=ConnectionConfig(kind=kind),
        data=DataConfig(sequence=32),
        optimizer=OptimizerConfig(warmup=5),
        training=TrainingConfig(steps=20, batch=4, validate_every=10, validation_batches=2),
    )


def losses(kind: str, folder: Path) -> list[float]:
    from tests.conftest import generated_text

    corpus = Corpus.of(np.frombuffer(generated_text(40_000).encode(), dtype=np.uint8))
    run = RunFolder(folder)
    train(config(kind), corpus, run)
    return [record["loss"] for record in run.metrics() if record["event"] == "step"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorded = {kind: losses(kind, Path(folder) / kind) for kind in KINDS}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")

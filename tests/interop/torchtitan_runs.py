"""Runs of torchtitan's own training program on a CPU: `python -m tests.interop.torchtitan_runs`.

Standard input holds the runs as JSON; each runs to its end before the next starts. One process
imports torchtitan, which takes seconds, and forks the ranks of all runs.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

PATIENCE = 300
"""Time limit of all runs together, in seconds."""

ALWAYS = "--training.seq_len 32 --debug.seed 1 --training.disable_cuda_graphs"
OURS = "--module manifold_hc.interop.torchtitan --config"
TINY = "--module tests.interop.torchtitan_configs --config tiny"


@dataclass
class Run:
    """One run of `python -m torchtitan.train`."""

    name: str
    args: str
    ranks: int = 1
    float32_experts: bool = False


@dataclass
class Outcome:
    """What every rank has logged: step, loss and gradient norm; and printed."""

    status: list[int]
    records: list[list[dict]]
    logs: list[str]

    def column(self, name: str, rank: int = -1) -> list[float]:
        assert not any(self.status), self.logs[rank][-3000:]
        return [record[name] for record in self.records[rank]]


def train(folder: Path, *runs: Run) -> list[Outcome]:
    """Train in `folder`, one run after the other."""
    subprocess.run(
        [sys.executable, "-m", "tests.interop.torchtitan_runs", str(folder)],
        input=json.dumps([asdict(run) for run in runs]).encode(),
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=PATIENCE,
        check=True,
    )
    return [_outcome(folder, run) for run in runs]


def _outcome(folder: Path, run: Run) -> Outcome:
    stems = [folder / f"{run.name}-{rank}" for rank in range(run.ranks)]
    lines = [Path(f"{stem}.jsonl").read_text().splitlines() for stem in stems]
    return Outcome(
        [int(Path(f"{stem}.status").read_text()) for stem in stems],
        [[json.loads(line) for line in rank] for rank in lines],
        [Path(f"{stem}.log").read_text() for stem in stems],
    )


def _run_all(folder: Path, runs: list[Run]) -> None:
    from tests.interop import torchtitan_cpu

    os.chdir(folder)
    torchtitan_cpu.write_assets(folder)
    for run in runs:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [os.fork() or _run_rank(folder, run, rank, port) for rank in range(run.ranks)]
        for child in children:
            os.waitpid(child, 0)


def _run_rank(folder: Path, run: Run, rank: int, port: int) -> int:
    """Run torchtitan's program as one rank; end the process."""
    from tests.interop import torchtitan_cpu

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(run.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    stem = f"{folder / run.name}-{rank}"
    log = os.open(f"{stem}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        with Path(f"{stem}.jsonl").open("w") as records:
            torchtitan_cpu.record_metrics(records)
            if run.float32_experts:
                torchtitan_cpu.use_float32_experts()
            if run.ranks == 1:
                torchtitan_cpu.shorten_the_end()
            sys.argv = ["train", *ALWAYS.split(), *run.args.split()]
            runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        Path(f"{stem}.status").write_text(str(status))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _run_all(Path(sys.argv[1]), [Run(**run) for run in json.load(sys.stdin)])

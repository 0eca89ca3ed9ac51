"""A run whose processes are killed one after the other and restarted by torchrun.

`python -m tests.parallel.drill --kills 20` (or `make drill`): kills random processes at random
moments, some while a checkpoint is written and some while they start, and compares the losses with
those of a calm run.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.parallel.layouts import figures

SIZE = 2
PATIENCE = 300.0
"""Seconds from one kill to the next."""


def training(text: Path, folder: Path, steps: int, *more: str) -> list[str]:
    """Program and options for torchrun."""
    return [
        *("-m", "manifold_hc", "train", "--data", str(text), "--out", str(folder)),
        *(f"parallel.shard={SIZE}", f"training.steps={steps}", "training.batch=4"),
        *("model.blocks=2", "model.channels=32", "data.sequence=32", "data.validation=0.2"),
        *("checkpoint.every=2", "training.validate_every=50", "training.probe_every=50"),
        *more,
    ]


def torchrun(log: Path, options: list[str], program: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *options, *program]
    with log.open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)


def start(
    text: Path, folder: Path, steps: int, restarts: int, log: Path, *more: str
) -> subprocess.Popen:
    """The run on one node."""
    options = ["--standalone", f"--nproc-per-node={SIZE}", f"--max-restarts={restarts}"]
    return torchrun(log, options, training(text, folder, steps, *more))


def nodes(text: Path, folder: Path, steps: int, logs: Path) -> list[subprocess.Popen]:
    """The run on two nodes of one process each, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=drill"]
    options = [f"--nnodes={SIZE}", "--nproc-per-node=1", "--max-restarts=1", *meeting]
    program = training(text, folder, steps)
    return [torchrun(logs / f"log of node {node}", options, program) for node in range(SIZE)]


def workers(agent: subprocess.Popen) -> dict[int, int]:
    """The processes that torchrun has started, by rank."""
    found = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = {}
    for pid in map(int, found):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for entry in environment:
            if entry.startswith(b"RANK="):
                ranks[int(entry[5:])] = pid
    return ranks


def pids(agent: subprocess.Popen) -> set[int]:
    return set(workers(agent).values())


def steps_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b'"event":"step"') if file.exists() else 0


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".*.tmp"))


def wait_until(condition, agent: subprocess.Popen, log: Path) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        if agent.poll() is not None or time.monotonic() > limit:
            raise SystemExit(f"the run has stopped or stands still:\n{log.read_text()[-4000:]}")
        time.sleep(0.0005)


def drill(text: Path, folder: Path, steps: int, moments: list[str], draw: random.Random) -> dict:
    """Kill once at each moment: "running", "saving" or "starting"; return counts and result."""
    calm, log = folder / "calm", folder / "log"
    agent = start(text, calm, steps, 0, folder / "log of the calm run")
    if agent.wait(PATIENCE):
        raise SystemExit((folder / "log of the calm run").read_text())
    run = folder / "run"
    agent = start(text, run, steps, len(moments), log)
    done = {"running": 0, "saving": 0, "starting": 0}
    before: set[int] = set()
    for number, moment in enumerate(moments):
        wait_until(lambda known=before: len(pids(agent) - known) == SIZE, agent, log)
        before = pids(agent)
        if moment == "starting":
            time.sleep(draw.uniform(0, 2))
        else:
            # The run must come as far as to a checkpoint, or it would never end; and it must not
            # end by itself, however late this process is.
            target = 1 + number * steps // (2 * len(moments))
            wait_until(lambda target=target: steps_of(run) > target, agent, log)
            if moment == "saving":
                wait_until(lambda: is_saving(run), agent, log)
        met = moment if moment == "starting" else "saving" if is_saving(run) else "running"
        os.kill(draw.choice(sorted(before)), signal.SIGKILL)
        done[met] += 1
        print(f"kill {number + 1}: {moment}, after {steps_of(run)} steps", flush=True)
    if agent.wait(PATIENCE):
        raise SystemExit(log.read_text()[-4000:])
    found, wanted = figures(run), figures(calm)
    return {"kills": done, "same": found == wanted, "loss": found["losses"][-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    # A kill meant for a save may come when it is just over: more are tried than are wanted.
    moments = ["saving"] * (given.kills // 2) + ["starting"] * max(2, given.kills // 8)
    moments += ["running"] * (given.kills - len(moments))
    draw.shuffle(moments)
    with tempfile.TemporaryDirectory() as folder:
        from tests.conftest import generated_text

        text = Path(folder) / "text.txt"
        text.write_text(generated_text(40_000))
        found = drill(text, Path(folder), given.steps, moments, draw)
    print(found)
    kills = found["kills"]
    if not found["same"] or kills["saving"] < given.kills // 4 or kills["starting"] < 2:
        raise SystemExit("the drill has failed")


if __name__ == "__main__":
    main()

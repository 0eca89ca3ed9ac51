"""Result files: what was measured, on what, with what, when."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch

import manifold_hc
from manifold_hc.bench.ops import OpsTable, Row
from manifold_hc.bench.peers import PEERS
from manifold_hc.bench.stacks import StackTable
from manifold_hc.bench.step import StepTable
from manifold_hc.errors import DataError
from manifold_hc.files import write_atomically

FOLDER = Path("benchmarks/results")
"""Where `--save` puts files, and where the page is made from."""


@dataclass
class Machine:
    """What a measurement depends on beside the code."""

    device: str
    """Model of the processor or the GPU."""
    kind: str
    """cpu or cuda."""
    threads: int
    system: str
    versions: dict[str, str]
    """manifold-hc, python, torch and the peers that are installed."""


@dataclass
class Record:
    """One result file."""

    bench: str
    """ops, step or memory."""
    machine: Machine
    date: str
    """Day of the measurement in UTC."""
    commit: str | None
    """Of a clone; None where the package is not in one."""
    command: str
    ops: list[OpsTable] | None = None
    step: list[StepTable] | None = None
    memory: list[StackTable] | None = None


def record(
    device: str,
    command: str,
    ops: list[OpsTable] | None = None,
    step: list[StepTable] | None = None,
    memory: list[StackTable] | None = None,
) -> Record:
    """What was just measured, with its circumstances."""
    name = "ops" if ops is not None else "step" if step is not None else "memory"
    today = datetime.now(UTC).date().isoformat()
    return Record(name, machine(device), today, commit(), command, ops, step, memory)


def machine(device: str) -> Machine:
    """What is measured on, seen from `device`."""
    versions = {
        "manifold-hc": manifold_hc.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    versions |= {peer.package: peer.version for peer in PEERS if peer.version}
    is_cpu = device == "cpu"
    name = processor() if is_cpu else torch.cuda.get_device_name(device)
    kind = device.partition(":")[0]
    return Machine(name, kind, torch.get_num_threads(), platform.platform(), versions)


def processor() -> str:
    """Model of the processor, with its widest vector unit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str | None:
    """The commit of this clone, with "-dirty" where files differ from it."""
    folder = Path(manifold_hc.__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True
        )
        answer = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def as_json(result: Record) -> bytes:
    """Everything, with the medians and ratios that the tables print."""
    content: dict[str, Any] = msgspec.to_builtins(result)
    for table, raw in zip(result.ops or [], content["ops"] or [], strict=True):
        best = table.ours
        for row, entry in zip(table.rows, raw["rows"], strict=True):
            if row.state == "timed":
                entry["median_seconds"] = row.total
                entry["times_ours"] = row.total / best.total if best else None
        raw["fastest_peer"] = _named(table.fastest_peer)
        raw["fastest_eager_peer"] = _named(table.fastest_eager_peer)
    for step, raw in zip(result.step or [], content["step"] or [], strict=True):
        raw["overhead"] = {kind: step.overhead(kind) for kind in step.kinds}
        raw["overhead_quartiles"] = {kind: step.overhead_range(kind) for kind in step.kinds}
        raw["residual_step_seconds"] = step.full_step()
    return msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def load(file: Path) -> Record:
    """A result file. Raises DataError for one that is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"bench: {file} is no result file: {error}; measure again") from None


def save(result: Record, folder: Path = FOLDER) -> Path:
    """Write `<device>-<date>-<bench>.json` into the folder; returns its path."""
    slug = "".join(c if c.isalnum() else "-" for c in result.machine.device.lower())
    device = "-".join(filter(None, slug.split("-")))
    file = folder / f"{device}-{result.date}-{result.bench}.json"
    write_atomically(file, as_json(result))
    return file


def _named(row: Row | None) -> str | None:
    return row.implementation if row else None

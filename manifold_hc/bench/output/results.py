"""Result files: figures, with the machine, versions, commit and command that produced them."""

import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

import manifold_hc
from manifold_hc.bench.accelerated import ModelResult
from manifold_hc.bench.ops import OpsResult
from manifold_hc.bench.peers import PEERS
from manifold_hc.bench.stacks import StackResult
from manifold_hc.bench.step import StepResult
from manifold_hc.errors import DataError
from manifold_hc.files import write_atomically

Bench = Literal["ops", "step", "memory", "transformers"]


@dataclass
class Machine:
    """Hardware, system and versions of a measurement."""

    device: str
    """Model of the processor or the GPU."""
    kind: str
    """cpu or cuda."""
    threads: int
    system: str
    versions: dict[str, str]
    """Versions of manifold-hc, python, torch and the installed peers."""


@dataclass
class Record:
    """One result file; `bench` names the field that has the results, one for each dtype."""

    bench: Bench
    machine: Machine
    date: str
    """Day of the measurement in UTC."""
    commit: str | None
    """Commit of the clone; None for an installed package."""
    command: str
    ops: list[OpsResult] | None = None
    step: list[StepResult] | None = None
    memory: list[StackResult] | None = None
    transformers: list[ModelResult] | None = None

    @property
    def results(self) -> list[Any]:
        """Results of the bench."""
        return getattr(self, self.bench) or []


def record(bench: Bench, device: str, command: str, results: list[Any]) -> Record:
    """Return the record of results that were just measured on `device`."""
    today = datetime.now(UTC).date().isoformat()
    return Record(bench, machine(device), today, commit(), command, **{bench: results})


def machine(device: str) -> Machine:
    """Describe this machine, with `device` as the one that computes."""
    versions = {
        "manifold-hc": manifold_hc.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    versions |= {peer.package: peer.version for peer in PEERS if peer.version}
    name = processor() if device == "cpu" else torch.cuda.get_device_name(device)
    kind = device.partition(":")[0]
    return Machine(name, kind, torch.get_num_threads(), platform.platform(), versions)


def processor() -> str:
    """Return the model of the processor, with its widest vector unit."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    found = re.search(r"^model name[^:]*:(.*)$", cpuinfo, re.MULTILINE)
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str | None:
    """Return the commit of this clone, with "-dirty" if files differ from it; None without one."""
    git = ["git", "-C", str(Path(manifold_hc.__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", "__init__.py"]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.check_output(describe, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(record: Record) -> bytes:
    """Encode a record, with the medians and ratios that the tables print."""
    content: dict[str, Any] = msgspec.to_builtins(record)
    for result, raw in zip(record.results, content[record.bench] or [], strict=True):
        if isinstance(result, OpsResult | StepResult | ModelResult):
            result.add_ratios(raw)
    return msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def load(file: Path) -> Record:
    """Read a result file. Raises DataError for any other file."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"bench: {file} is no result file: {error}; measure again") from None


def load_all(folder: Path) -> list[Record]:
    """Read all result files of a folder, by name."""
    return [load(file) for file in sorted(folder.glob("*.json"))]


def save(record: Record, folder: Path = Path("benchmarks/results")) -> Path:
    """Write `<device>-<date>-<bench>.json` into the folder; return its path."""
    device = re.sub(r"[\W_]+", "-", record.machine.device.lower()).strip("-")
    file = folder / f"{device}-{record.date}-{record.bench}.json"
    write_atomically(file, as_json(record))
    return file

"""`mhc info`: versions, devices and backends."""

import importlib.util
import os
import platform
import shlex
import subprocess
from importlib import metadata

import click
from rich.markup import escape
from rich.table import Table

from manifold_hc.cli.terminal import console

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "pyarrow",
    "tensorboard",
    "transformers",
)


@click.command()
def info() -> None:
    """Versions, devices, backends, compiler and caches, for a bug report.

    \b
    mhc info
    """
    import torch

    import manifold_hc
    from manifold_hc.files import cache_folder
    from manifold_hc.kernels import backends

    reasons = {name: _unusable(name) for name in backends()}
    usable = [name for name, reason in reasons.items() if not reason]
    missing = [f"{name} not usable: {reason}" for name, reason in reasons.items() if reason]
    rows = {
        "manifold-hc": manifold_hc.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in PACKAGES},
        "devices": ", ".join(_devices(torch)),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "backends": "; ".join(filter(None, (", ".join(usable), *missing))),
        "compiler": _compiler(),
        "cache": str(cache_folder()),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows.items():
        table.add_row(*map(escape, row))
    console().print(table)


def _unusable(backend: str) -> str:
    """Return the reason that a backend is unusable on this machine, "" if none is known."""
    if backend == "triton":
        import torch

        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return "" if torch.cuda.is_available() else "torch finds no GPU"
    return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices(torch) -> list[str]:  # type: ignore[no-untyped-def]
    found = [f"cpu ({torch.backends.cpu.get_cpu_capability()})"]
    found += [
        f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        for index in range(torch.cuda.device_count())
    ]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _compiler() -> str:
    from manifold_hc.kernels.cpu.compiler import find_compiler

    command = find_compiler()
    if command is None:
        return "none as $CXX, g++, clang++ or c++"
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return next(iter(answer.stdout.splitlines()), shlex.join(command))

"""Libraries in a wheel, and the choice of one for this processor.

Imports the standard library only, as `compiler` does.
"""

import platform
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "lib"
"""A wheel's libraries; a source checkout has no such folder."""


class Variant(NamedTuple):
    """An instruction set: compiler flags, and Linux's names of the processor features it needs."""

    name: str
    machine: str
    flags: tuple[str, ...]
    features: frozenset[str]


_V2 = frozenset({"pni", "ssse3", "sse4_1", "sse4_2", "cx16", "lahf_lm", "popcnt"})
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

VARIANTS = (
    Variant(
        "x86-64-v4-bf16",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512bf16"),
        _V4 | {"avx512_bf16"},
    ),
    Variant("x86-64-v4", "x86_64", ("-march=x86-64-v4",), _V4),
    Variant("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3),
    Variant("aarch64", "aarch64", ("-march=armv8-a",), frozenset({"asimd"})),
)
"""Variants of all machines, the fastest of a machine first."""


def fitting(machine: str, features: Collection[str]) -> Variant | None:
    """Return the fastest variant whose instructions the processor has; None without one."""
    return next(
        (v for v in VARIANTS if v.machine == machine and v.features.issubset(features)), None
    )


def processor_features(cpuinfo: str) -> frozenset[str]:
    """Return the features that all processors in /proc/cpuinfo have."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    sets = [frozenset(v.split()) for key, _, v in lines if key.strip() in ("flags", "Features")]
    return frozenset.intersection(*sets) if sets else frozenset()


def find() -> Path | None:
    """Return the path of the wheel's library for this processor; None if it has none.

    The file may be missing or damaged.
    """
    try:
        features = processor_features(Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        return None
    variant = fitting(platform.machine(), features) if FOLDER.is_dir() else None
    return FOLDER / f"{variant.name}.so" if variant else None

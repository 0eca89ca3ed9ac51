"""The libraries that a wheel brings along, and which of them fits this processor.

The standard library alone, as in `compiler`.
"""

import platform
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "lib"
"""A wheel's libraries; a source checkout has no such folder."""


class Variant(NamedTuple):
    """An instruction set: the compiler's flags for it, and how Linux names what it needs."""

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
"""The fastest of a machine first."""


def fitting(machine: str, features: Collection[str]) -> Variant | None:
    """The fastest variant all of whose instructions the processor has; None if there is none."""
    return next(
        (v for v in VARIANTS if v.machine == machine and v.features.issubset(features)), None
    )


def processor_features(cpuinfo: str) -> frozenset[str]:
    """What every processor of /proc/cpuinfo has, and the system lets programs use."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    sets = [frozenset(v.split()) for key, _, v in lines if key.strip() in ("flags", "Features")]
    return frozenset.intersection(*sets) if sets else frozenset()


def find() -> Path | None:
    """The wheel's library for this processor, which may be missing or damaged; None without one."""
    try:
        features = processor_features(Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        return None
    variant = fitting(platform.machine(), features) if FOLDER.is_dir() else None
    return FOLDER / f"{variant.name}.so" if variant else None

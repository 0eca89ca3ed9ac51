"""Record of a comparison, `comparison.json`: commands, variants, data, date, machine, versions."""

import json
import shlex
from pathlib import Path
from typing import Any

from manifold_hc.errors import RunFolderError
from manifold_hc.files import remove_temporaries, write_atomically
from manifold_hc.training import RunFolder
from manifold_hc.training.folder import is_empty
from manifold_hc.training.json_files import read_record
from manifold_hc.training.record import COMPARISON


def comparison_record(folder: Path) -> dict[str, Any]:
    """Return commands, variants, data, machine and versions of a comparison, empty if it is none.

    Raises RunFolderError if the record is damaged.
    """
    wanted = {"commands": list[str], "variants": list[str], "data_sha256": str}
    each = f"mhc report {shlex.quote(str(folder))}/VARIANT/seed-N"
    repair = f"put a copy of it back, or see each run: {each}"
    return read_record(folder / COMPARISON, wanted, repair)


def check_folder(folder: Path) -> None:
    """Raise RunFolderError unless the folder is empty, new, or holds a comparison."""
    if not comparison_record(folder) and not is_empty(folder):
        raise RunFolderError(
            f"run folder: {folder} holds files of something else; choose another with --out"
        )


def run_folder(folder: Path, variant: str, seed: int) -> RunFolder:
    """Return the run folder of one variant and seed of the comparison in `folder`."""
    return RunFolder(folder / variant / f"seed-{seed}")


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Write a record atomically; OSError if that fails."""
    remove_temporaries(file)
    write_atomically(file, json.dumps(record, indent=2) + "\n")


def with_new(known: list[str], *new: str) -> list[str]:
    """Return `known` with the entries of `new` that it lacks appended."""
    return list(dict.fromkeys([*known, *new]))

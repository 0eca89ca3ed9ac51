"""Record of a run's origin, run.json: commands, date, machine and versions."""

import json
import logging
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from manifold_hc.errors import RunFolderError
from manifold_hc.files import remove_temporaries, write_atomically
from manifold_hc.training.json_files import read_record

logger = logging.getLogger("manifold_hc")

RUN = "run.json"

COMPARISON = "comparison.json"
"""The record of a comparison, in a folder that holds several runs."""


def machine() -> dict[str, Any]:
    """Return today's date, this machine and its versions, as records hold them."""
    return {
        "date": date.today().isoformat(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def record_run(folder: Path, command: str, init: Mapping[str, Any] | None = None) -> None:
    """Add a command to the record of a run, with date, machine and versions.

    init: origin of the initial weights of a new run, which a resumed run keeps.
    A record that is damaged or cannot be written is logged and does not stop the run.
    """
    try:
        known = run_record(folder)
    except RunFolderError as error:
        logger.warning("%s; it is begun again", error)
        known = {}
    init = known.get("init", init)
    commands = list(dict.fromkeys([*known.get("commands", []), command]))
    record = {"commands": commands, **({} if init is None else {"init": init}), **machine()}
    try:
        remove_temporaries(folder / RUN)
        write_atomically(folder / RUN, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        logger.warning("run folder: %s cannot be written: %s", folder / RUN, error.strerror)


def run_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run, empty if it has none; raise RunFolderError if it is damaged."""
    members = {"commands": list[str], "date": str, "machine": str}
    return read_record(folder / RUN, members, "no run needs it: it may be deleted")

"""Killed before any of its file-system operations, a run can go on or start again.

The operations are those that Python audits. The folder is copied before each of them; the copy is
the folder that a SIGKILL leaves at this point, since neither has the content of Python's buffers.
"""

import os
import re
import shutil
import sys

import pytest

from tests.conftest import generated_text
from tests.training.runs import in_process

CHANGING = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "os.symlink",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

SMALL = (
    "model.blocks=1",
    "model.channels=16",
    "model.attention.heads=2",
    "data.sequence=16",
    "training.batch=2",
    "training.steps=1",
    "training.validation_batches=1",
    "checkpoint.every=1",
    "checkpoint.keep=1",
)


def run(*arguments, before=None):
    """Exit status of `mhc train` in a fork, which calls `before` at each of its operations."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if before:
        sys.addaudithook(before)
    from manifold_hc.cli import main

    try:
        main(["train", *arguments])
    except SystemExit as error:
        os._exit(error.code or 0)
    except BaseException:
        os._exit(99)
    os._exit(0)


def copying(folder, copies):
    """A hook that copies the folder before every operation that changes something in it."""

    def watch(event, values):
        if event == "open":
            path, _, flags = values
            if not flags & WRITING:
                return
        elif event in CHANGING:
            path = values[0]
        else:
            return
        if isinstance(path, int) or not os.fsdecode(path).startswith(str(folder)):
            return
        state = shape(folder)
        if folder.is_dir() and state not in seen:
            seen.add(state)
            shutil.copytree(folder, copies / f"{len(seen):03}")

    seen = set()
    return watch


def shape(folder):
    """Names without random parts, and sizes above 0: the facts that a start may depend on."""
    return frozenset(
        (
            re.sub(r"[0-9a-f]{8}\.tmp$", "tmp", str(file.relative_to(folder))),
            file.stat().st_size > 0,
        )
        for file in folder.rglob("*")
    )


def spread(found, most):
    """Return at most `most` items, evenly spread from the first to the last."""
    count = min(most, len(found))
    return [found[number * (len(found) - 1) // (count - 1)] for number in range(count)]


def start_at_points(place, most):
    """Return copies in which no run could start, and files left behind. Runs in its own process."""
    import manifold_hc.cli
    import manifold_hc.report  # noqa: F401  # matplotlib too: once, not in every fork

    text, folder, copies = place / "text", place / "run", place / "copies"
    text.write_text(generated_text(4000))
    assert (
        run("--data", str(text), "--out", str(folder), *SMALL, before=copying(folder, copies)) == 0
    )
    wanted = (folder / "model.safetensors").read_bytes()
    failed, left = {}, []
    points = sorted(copies.iterdir())
    for copy in spread(points, most):
        there = sorted(file.name for file in copy.iterdir())
        status = run("--resume", str(copy)) and run("--data", str(text), "--out", str(copy), *SMALL)
        complete = "summary.json" in there
        if (status and not complete) or (copy / "model.safetensors").read_bytes() != wanted:
            failed[copy.name] = there
        if not complete:
            left += [file for file in copy.rglob(".*") if file.name not in (".lock", ".metadata")]
    return len(points), failed, left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("most", [8, pytest.param(1000, marks=pytest.mark.wide)])
def test_a_run_killed_at_any_operation_goes_on_or_starts_again(tmp_path, most):
    """At 8 operations, or at all of them with --wide."""
    (points, failed, left), _ = in_process(start_at_points, tmp_path, most)
    assert points > 15
    assert failed == {}
    assert left == []

"""An unwritable folder is refused at once; only on a full disk writes are retried.

`/sys` stands for it: there not even root can make a file. Where there is none, a file in the place
of a folder does.
"""

import os
import shutil
import signal
import socket
import stat
from pathlib import Path

import pytest

from manifold_hc.errors import CheckpointError, ManifoldError, RunFolderError, StoppedError
from manifold_hc.files import remove_temporaries, retry_write, write_atomically
from manifold_hc.training import CheckpointConfig, Checkpoints, RunFolder
from manifold_hc.training.checkpoint_files import read_manifest, verify
from tests.training import runs
from tests.training.runs import at_step, figures, train_or_resume

UNWRITABLE = Path("/sys/kernel")
SHORT = runs.config(steps=6, probe_every=1, checkpoint=CheckpointConfig(every=4))

needs_sys = pytest.mark.skipif(
    not UNWRITABLE.is_dir(), reason="needs a folder that not even root can write"
)


def in_the_place_of(path, kind):
    """Create something else in the place of a file or folder of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("in the way")
    elif kind == "read-only file system":
        path.symlink_to(UNWRITABLE)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))


@pytest.mark.parametrize("kind", ["file", pytest.param("read-only file system", marks=needs_sys)])
def test_checkpoints_that_cannot_be_written_are_refused_before_the_first_step(tmp_path, kind):
    in_the_place_of(tmp_path / "run" / "checkpoints", kind)
    steps = at_step(0, None)
    with pytest.raises(RunFolderError, match=r"^checkpoint: .*checkpoints cannot be written \("):
        train_or_resume(SHORT, runs.text(), tmp_path / "run", [steps])
    assert [found.name for found in (tmp_path / "run").iterdir()] == ["checkpoints"]


def calm(folder):
    train_or_resume(SHORT, runs.text(), folder, [at_step(-1, None)])


@pytest.mark.parametrize("kind", ["file", pytest.param("read-only file system", marks=needs_sys)])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_whose_checkpoints_become_unwritable_ends(tmp_path, kind, asynchronous):
    """The error names the step that is not saved; the run resumes once the folder is repaired."""
    config = runs.config(
        steps=6, probe_every=1, checkpoint=CheckpointConfig(every=2, asynchronous=asynchronous)
    )
    folder = tmp_path / "run" / "checkpoints"

    def stop(_):
        os.kill(os.getpid(), signal.SIGTERM)

    def spoil(_):
        shutil.move(folder, tmp_path / "aside")
        in_the_place_of(folder, kind)

    # Stopped once, so that no thread still writes a checkpoint when its folder is moved away.
    with pytest.raises(StoppedError, match="after 2 steps"):
        train_or_resume(config, runs.text(), tmp_path / "run", [at_step(1, stop)])
    with pytest.raises(ManifoldError, match=r"cannot be written \(.*\), and step 4 is not saved; "):
        train_or_resume(config, runs.text(), tmp_path / "run", [at_step(1, spoil)])
    folder.unlink()
    shutil.move(tmp_path / "aside", folder)
    train_or_resume(config, runs.text(), tmp_path / "run", [at_step(-1, None)])
    calm(tmp_path / "calm")
    assert figures(tmp_path / "run") == figures(tmp_path / "calm")


def test_metrics_that_become_unwritable_end_the_run(tmp_path):
    def spoil(_):
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()

    with pytest.raises(ManifoldError, match=r"metrics\.jsonl cannot be written: Is a directory; "):
        train_or_resume(SHORT, runs.text(), tmp_path, [at_step(2, spoil)])


def test_the_end_of_a_run_does_not_wait_for_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    asked = []

    def write():
        write_atomically(tmp_path / "file" / "weights", "content")

    with pytest.raises(NotADirectoryError):
        retry_write(write, "the weights", lambda: asked.append(1) or True)
    assert not asked, "another attempt was due"


@pytest.mark.parametrize("kind", ["folder", pytest.param("read-only file system", marks=needs_sys)])
def test_a_failed_write_names_the_file_and_not_the_temporary_one(tmp_path, kind):
    file = tmp_path / "place" / "weights"
    in_the_place_of(file if kind == "folder" else file.parent, kind)
    with pytest.raises(OSError, match="weights") as error:
        write_atomically(file, "content")
    assert error.value.filename == str(file)


FILES = ["config.json", "metrics.jsonl", ".job", "summary.json"]
KINDS = ["FIFO", "folder", "device", "socket"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_run_reads_regular_files_alone(tmp_path, monkeypatch, name, kind):
    """Opening a FIFO would wait for a writer, and a device may never end."""
    monkeypatch.chdir(tmp_path)
    in_the_place_of(tmp_path / name, kind)
    run = RunFolder(tmp_path)
    read = {
        "config.json": run.config,
        "metrics.jsonl": run.metrics,
        ".job": lambda: run.has_job("7"),
        "summary.json": run.summary,
    }
    with pytest.raises(RunFolderError, match=rf"{name} cannot be read: is not a regular file"):
        read[name]()


def test_a_damaged_job_file_names_no_job(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.has_job("7")
    run.set_job("7")
    assert run.has_job("7")
    assert not run.has_job("8")
    assert not run.has_job(None)
    (tmp_path / ".job").write_bytes(b"\xff")
    assert not run.has_job("7")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_regular_files_alone(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000001"
    in_the_place_of(path / "checkpoint.json", kind)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_manifest(path)
    names = ("checkpoint.json", ".metadata")
    (path / "SHA256SUMS").write_text("".join(f"0  {name}\n" for name in names))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: is not a regular file"):
        verify(path)
    (path / "SHA256SUMS").unlink()
    in_the_place_of(path / "SHA256SUMS", kind)
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: is not a regular file"):
        verify(path)


def test_every_file_of_a_run_has_the_umasks_mode(tmp_path):
    before = os.umask(0o027)
    try:
        calm(tmp_path)
    finally:
        os.umask(before)
    modes = {
        str(file.relative_to(tmp_path)): stat.S_IMODE(file.stat().st_mode)
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }
    assert "checkpoints/step-00000006/model.safetensors" in modes
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o640} == {}


def test_a_start_removes_its_own_temporary_files_and_no_others(tmp_path):
    own = [".config.json.0a1b2c3d.tmp", ".metrics.jsonl.00000000.tmp", "..job.ffffffff.tmp"]
    others = [".report.html.0a1b2c3d.tmp", ".config.json.mine.tmp", ".hidden"]
    for name in own + others:
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoints" / ".step-00000003.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".keys").mkdir()
    calm(tmp_path)
    hidden = {file.name for file in tmp_path.rglob(".*")} - {".metadata"}
    assert hidden == {*others, ".keys"}


def test_names_with_glob_characters(tmp_path):
    (tmp_path / ".a[1].01234567.tmp").write_text("")
    (tmp_path / ".a1.01234567.tmp").write_text("")
    remove_temporaries(tmp_path / "a[1]")
    assert [file.name for file in tmp_path.iterdir()] == [".a1.01234567.tmp"]


@pytest.mark.parametrize(
    ("left", "new"),
    [
        ([], True),
        ([".lock", ".config.json.0a1b2c3d.tmp", "metrics.jsonl", "checkpoints/"], True),
        (["metrics.jsonl:{}"], False),
        (["checkpoints/step-00000001/"], False),
        (["config.json"], False),
        (["model.safetensors"], False),
    ],
)
def test_a_run_starts_in_a_folder_without_results(tmp_path, left, new):
    for name in left:
        path, _, content = name.partition(":")
        if path.endswith("/"):
            (tmp_path / path).mkdir(parents=True)
        else:
            (tmp_path / path).write_text(content)
    assert RunFolder(tmp_path).is_new() is new
    if new:
        with pytest.raises(RunFolderError, match=r"has no config\.json: no run has begun there"):
            RunFolder(tmp_path).config()
        assert Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), "").find() is None

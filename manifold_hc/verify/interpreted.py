"""Run Triton kernels of other libraries on the CPU: in a process that interprets them."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from manifold_hc.errors import LostProcessError

Result = TypeVar("Result")

CODE = "import sys; from manifold_hc.verify.interpreted import run; run(sys.argv[1])"
"""Program of the process; unlike multiprocessing it does not import the user's script again."""


def interpreted(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a new process whose Triton interprets its kernels on the CPU.

    Triton decides it at its first import, which may have happened in this process. Function,
    arguments and result must be picklable. An error of the function is raised here.
    Raises LostProcessError if the process ends without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "call.pickle")
        file.write_bytes(pickle.dumps((function, args)))
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(file)],
            env=dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""),
            capture_output=True,
            text=True,
            check=False,
        )
        answer = file.with_suffix(".answer")
        if not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise LostProcessError(
                f"verify: the process that interprets Triton's kernels must give a result but "
                f"ended with status {done.returncode}: {last}"
            )
        result, error = pickle.loads(answer.read_bytes())
    if error is not None:
        raise cast(Exception, error)
    return cast(Result, result)


def run(path: str) -> None:
    """Call the function of a file that `interpreted` wrote, and write its result."""
    file = Path(path)
    function, args = pickle.loads(file.read_bytes())
    answer: tuple[Any, Exception | None]
    try:
        answer = function(*args), None
    except Exception as error:  # raised again in the process that waits
        answer = None, error
    file.with_suffix(".answer").write_bytes(pickle.dumps(answer))

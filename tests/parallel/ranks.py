"""Test processes joined through gloo."""

import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.training.runs import forkserver

PATIENCE = 120.0
"""Time limit of a group, in seconds."""


class ProcessEnded(Exception):
    """A process that ended without a result, with this exit status."""


def run_on_ranks(size: int, body: Callable[..., Any], *arguments: object) -> list[Any]:
    """Run `body` in `size` processes; return the results by rank, or raise the error of one."""
    answers = outcomes(size, body, *arguments)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    for answer in sorted(failed, key=lambda answer: isinstance(answer, ProcessEnded)):
        raise answer
    return answers


def outcomes(size: int, body: Callable[..., Any], *arguments: object) -> list[Any]:
    """Return results or errors by rank; processes left waiting by a failed one are killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, started = [], []
    for rank in range(size):
        here, there = forkserver().Pipe()
        known = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        process = forkserver().Process(target=_run, args=(there, known, body, arguments))
        process.start()
        there.close()
        pipes.append(here)
        started.append(process)
    found: dict[int, Any] = {}
    try:
        while len(found) < size and not _failed(found):
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], PATIENCE)
            if not ready:
                raise TimeoutError(
                    f"processes {sorted(set(range(size)) - set(found))} give no result"
                )
            for pipe in ready:
                rank = pipes.index(pipe)
                found[rank] = _answer(pipe, started[rank])
    finally:
        for process in started:
            if process.is_alive() and len(found) < size:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [found.get(rank, ProcessEnded("alone")) for rank in range(size)]


def _failed(found: dict[int, Any]) -> bool:
    return any(isinstance(answer, BaseException) for answer in found.values())


def _answer(pipe: Connection, process: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return ProcessEnded(process.exitcode)


def _run(pipe: Connection, known: dict[str, object], body: Callable, arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in known.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message in (
        r"`torch\.jit\.script",
        r"The \.grad attribute of a Tensor that is not a leaf",
    ):
        warnings.filterwarnings("ignore", message)  # caused by torch.compile
    try:
        answer = body(*arguments)
    except BaseException as error:
        answer = error
    pipe.send(answer)

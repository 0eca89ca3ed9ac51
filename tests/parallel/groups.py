"""Processes that meet through gloo, for tests."""

import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.training.runs import children

PATIENCE = 120.0
"""Seconds that a group may take."""


class Ended(Exception):
    """A process that ended without an answer, by this exit status."""


def together(size: int, body: Callable[..., Any], *arguments: object) -> list[Any]:
    """What `body` returns in each of so many processes, by rank; raises what one of them raises."""
    answers = outcomes(size, body, *arguments)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    for answer in sorted(failed, key=lambda answer: isinstance(answer, Ended)):
        raise answer
    return answers


def outcomes(size: int, body: Callable[..., Any], *arguments: object) -> list[Any]:
    """What `body` returns or raises in each process; one that another left alone is ended."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, started = [], []
    for rank in range(size):
        here, there = children().Pipe()
        known = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        process = children().Process(target=_run, args=(there, known, body, arguments))
        process.start()
        there.close()
        pipes.append(here)
        started.append(process)
    found: dict[int, Any] = {}
    try:
        while len(found) < size and not _failed(found):
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], PATIENCE)
            if not ready:
                raise TimeoutError(f"processes {sorted(set(range(size)) - set(found))} say nothing")
            for pipe in ready:
                rank = pipes.index(pipe)
                found[rank] = _answer(pipe, started[rank])
    finally:
        for process in started:
            if process.is_alive() and len(found) < size:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [found.get(rank, Ended("alone")) for rank in range(size)]


def _failed(found: dict[int, Any]) -> bool:
    return any(isinstance(answer, BaseException) for answer in found.values())


def _answer(pipe: Connection, process: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return Ended(process.exitcode)


def _run(pipe: Connection, known: dict[str, object], body: Callable, arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in known.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for of_itself in (
        r"`torch\.jit\.script",
        r"The \.grad attribute of a Tensor that is not a leaf",
    ):
        warnings.filterwarnings("ignore", of_itself)  # what torch's compiler makes torch say
    try:
        answer = body(*arguments)
    except BaseException as error:
        answer = error
    pipe.send(answer)

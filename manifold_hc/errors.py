"""The errors a user can cause or meet, each with one message: operation, wanted, got, repair."""

import math
from signal import Signals


class ManifoldError(Exception):
    """Any error of this package; the command line prints it as one line."""


class ConfigError(ManifoldError, ValueError):
    """A configuration that cannot be built."""


class ShapeError(ManifoldError, ValueError):
    """A tensor whose shape does not fit the operation."""


class DtypeError(ManifoldError, TypeError):
    """A tensor whose dtype the operation does not take."""


class BackendError(ManifoldError, RuntimeError):
    """A named backend that cannot serve the call; never answered by another backend."""


class DataError(ManifoldError, ValueError):
    """Training data that is missing, empty, binary or too short."""


class RunFolderError(ManifoldError, RuntimeError):
    """A run folder that is in use, or that holds something else."""


class CheckpointError(ManifoldError, RuntimeError):
    """A checkpoint that is damaged, of another model or of other data."""


class MissingExtraError(ManifoldError, ImportError):
    """An optional dependency that is not installed; the message names the extra that brings it."""


class DivergedError(ManifoldError, ArithmeticError):
    """A loss or gradient that is not finite; training stopped there."""

    def __init__(self, step: int, what: str, where: str) -> None:
        """`step`: the first whose `what` ("loss" or "gradient norm") was not finite."""
        super().__init__(f"train: {what} is not finite at step {step}, first in {where}")
        self.step = step
        self.what = what
        self.where = where

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        """As it was made: another process may raise it."""
        return type(self), (self.step, self.what, self.where)


class StoppedError(ManifoldError):
    """A run that was asked to stop, by a signal."""

    def __init__(self, step: int, signal: Signals, saved: bool) -> None:
        """`step`: steps taken; `saved`: whether their checkpoint is there."""
        state = "its checkpoint is saved" if saved else "ITS CHECKPOINT COULD NOT BE SAVED"
        super().__init__(f"train: stopped by {signal.name} after {step} steps; {state}")
        self.step = step
        self.signal = signal
        self.saved = saved

    def __reduce__(self) -> tuple[type, tuple[int, Signals, bool]]:
        """As it was made: another process may raise it."""
        return type(self), (self.step, self.signal, self.saved)


class LostProcessError(ManifoldError, RuntimeError):
    """A process of a run of several that has gone away, or does not answer."""


def require_number(config: object, *names: str, positive: bool = False) -> None:
    """Raise ConfigError for the first of `config`'s `names` that is not finite and from 0 on.

    With `positive`, 0 is refused too; None is a default that somebody else fills in.
    """
    for name in names:
        value = getattr(config, name)
        if value is None or (math.isfinite(value) and (value > 0 or (value == 0 and not positive))):
            continue
        wanted = "a number above 0" if positive else "a number from 0 on"
        raise ConfigError(f"{name}: must be {wanted} but is {value}")


def require_at_least_one(config: object, *names: str) -> None:
    """Raise ConfigError for the first of `config`'s sizes `names` that is below 1."""
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ConfigError(f"{name}: must be at least 1 but is {value}")

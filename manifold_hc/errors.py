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


class OutOfMemoryError(ManifoldError, MemoryError):
    """A kernel that found no memory; its call has changed nothing."""


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


LARGEST_SIZE = 2**31 - 1
"""Up to which a size or a count may go: products of two of them fit into 64 bits."""


def require_number(config: object, *names: str, positive: bool = False) -> None:
    """Raise ConfigError for the first of `config`'s `names` that is not finite and from 0 on.

    With `positive`, 0 is refused too. A whole number is refused above `LARGEST_SIZE`. None is a
    default that is filled in later.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise ConfigError(f"{name}: must be a number but is {value!r}")
        finite = isinstance(value, int) or math.isfinite(value)
        if finite and (value > 0 or (value == 0 and not positive)):
            if isinstance(value, int):
                _require_no_larger(name, value)
            continue
        wanted = "a number above 0" if positive else "a number from 0 on"
        got = shown(value) if isinstance(value, int) else value
        raise ConfigError(f"{name}: must be {wanted} but is {got}")


def require_at_least_one(config: object, *names: str) -> None:
    """Raise ConfigError for the first of `config`'s sizes `names` not from 1 to `LARGEST_SIZE`."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}: must be an integer but is {value!r}")
        if value < 1:
            raise ConfigError(f"{name}: must be at least 1 but is {shown(value)}")
        _require_no_larger(name, value)


def _require_no_larger(name: str, value: int) -> None:
    if value > LARGEST_SIZE:
        raise ConfigError(f"{name}: must be at most {LARGEST_SIZE} but is {shown(value)}")


def shown(number: int) -> str:
    """A whole number as text; only its length where it has more digits than a line should."""
    digits = math.ceil(abs(number).bit_length() * math.log10(2))
    return str(number) if digits <= 40 else f"a number of {digits} digits"


def require_integer(operation: str, name: str, value: object, least: int) -> None:
    """Raise ConfigError unless `value` is an integer from `least` on; True is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"{operation}: {name} must be an integer but is {value!r}, a {type(value).__name__}"
        )
    if value < least:
        wanted = "not be negative" if least == 0 else f"be at least {least}"
        raise ConfigError(f"{operation}: {name} must {wanted} but is {shown(value)}")

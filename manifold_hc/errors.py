"""Error types of the package and checks of configuration values.

A message names the operation, the wanted value, the value it got, and the repair.
"""

import math
from signal import Signals


class ManifoldError(Exception):
    """Base of all errors of this package; the command line prints it as one line."""


class ConfigError(ManifoldError, ValueError):
    """A configuration value that is not valid."""


class ShapeError(ManifoldError, ValueError):
    """A tensor with a shape that does not fit the operation."""


class DtypeError(ManifoldError, TypeError):
    """A tensor with a dtype that the operation does not take."""


class BackendError(ManifoldError, RuntimeError):
    """A backend, chosen by name, that does not support the call; no other backend replaces it."""


class OutOfMemoryError(ManifoldError, MemoryError):
    """A kernel that could not allocate memory; the call has changed nothing."""


class DataError(ManifoldError, ValueError):
    """Training data that is missing, empty, binary or too short."""


class RunFolderError(ManifoldError, RuntimeError):
    """A run folder that is in use, damaged, or holds other files."""


class CheckpointError(ManifoldError, RuntimeError):
    """A checkpoint that is damaged, of another model or of other data."""


class MissingExtraError(ManifoldError, ImportError):
    """An optional dependency that is not installed; the message names the extra that brings it."""


class DivergedError(ManifoldError, ArithmeticError):
    """A loss or gradient norm that is not finite; the run has stopped."""

    def __init__(self, step: int, quantity: str, origin: str) -> None:
        """quantity: loss or gradient norm, first not finite at `step`; origin: layer or weight."""
        super().__init__(f"train: {quantity} is not finite at step {step}, first in {origin}")
        self.step = step
        self.quantity = quantity
        self.origin = origin

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        """Pickle by the constructor's arguments, so that another process can raise it."""
        return type(self), (self.step, self.quantity, self.origin)


class StoppedError(ManifoldError):
    """A run that a signal has stopped."""

    def __init__(self, step: int, signal: Signals, saved: bool) -> None:
        """step: number of steps taken; saved: True if their checkpoint is on disk."""
        state = "its checkpoint is saved" if saved else "ITS CHECKPOINT COULD NOT BE SAVED"
        super().__init__(f"train: stopped by {signal.name} after {step} steps; {state}")
        self.step = step
        self.signal = signal
        self.saved = saved

    def __reduce__(self) -> tuple[type, tuple[int, Signals, bool]]:
        """Pickle by the constructor's arguments, so that another process can raise it."""
        return type(self), (self.step, self.signal, self.saved)


class LostProcessError(ManifoldError, RuntimeError):
    """A process of a distributed run that has exited or does not respond."""


LARGEST_SIZE = 2**31 - 1
"""Largest size or count: a product of two of them fits into 64 bits."""


def require_number(config: object, *names: str, positive: bool = False) -> None:
    """Raise ConfigError unless the fields `names` of `config` are finite numbers of at least 0.

    An integer above `LARGEST_SIZE` is an error, and with `positive` 0 is too. None is allowed:
    it is a default that is filled in later.
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
                _require_at_most_largest(name, value)
            continue
        wanted = "a number above 0" if positive else "a number from 0 on"
        got = shown(value) if isinstance(value, int) else value
        raise ConfigError(f"{name}: must be {wanted} but is {got}")


def require_at_least_one(config: object, *names: str) -> None:
    """Raise ConfigError unless the fields `names` of `config` are integers in 1..LARGEST_SIZE."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}: must be an integer but is {value!r}")
        if value < 1:
            raise ConfigError(f"{name}: must be at least 1 but is {shown(value)}")
        _require_at_most_largest(name, value)


def _require_at_most_largest(name: str, value: int) -> None:
    if value > LARGEST_SIZE:
        raise ConfigError(f"{name}: must be at most {LARGEST_SIZE} but is {shown(value)}")


def shown(number: int) -> str:
    """Format an integer for a message; above 40 digits, give only the number of digits."""
    digits = math.ceil(abs(number).bit_length() * math.log10(2))
    return str(number) if digits <= 40 else f"a number of {digits} digits"


def require_integer(operation: str, name: str, value: object, least: int) -> None:
    """Raise ConfigError unless `value` is an integer of at least `least`; a bool is an error."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"{operation}: {name} must be an integer but is {value!r}, a {type(value).__name__}"
        )
    if value < least:
        wanted = "not be negative" if least == 0 else f"be at least {least}"
        raise ConfigError(f"{operation}: {name} must {wanted} but is {shown(value)}")

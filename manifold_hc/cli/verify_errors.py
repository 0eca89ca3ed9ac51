"""Exit status of a check that could not be done: 2, so that 1 means a difference."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from manifold_hc.errors import ManifoldError


@contextmanager
def invalid_where_not_compared() -> Iterator[None]:
    """Turn every error inside into a `click.ClickException`, for which `mhc` exits with 2.

    Click's own errors and a closed pipe pass as they are.
    """
    try:
        yield
    except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
        raise
    except ManifoldError as error:
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
        raise click.ClickException(text) from error
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise click.ClickException(text) from error
    except Exception as error:  # a defect, or no memory: it says nothing about the checkpoint
        raise click.ClickException(
            f"verify: wanted a comparison, got {type(error).__name__}: {error}{_place(error)}; "
            "nothing is known about the checkpoint; report it with `mhc info`"
        ) from error


def _place(error: Exception) -> str:
    """Return file and line that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"

"""Optional dependencies: the extra `train` brings what the commands and the trainer need."""

from importlib.util import find_spec

from manifold_hc.errors import MissingExtraError

TRAIN = (
    "click",
    "docstring_parser",
    "jinja2",
    "matplotlib",
    "msgspec",
    "numpy",
    "rich",
    "safetensors",
)
"""Import names of the packages that `manifold-hc[train]` installs."""


def require_train(what: str) -> None:
    """Raise MissingExtraError if a package of the extra `train` is missing; imports none of them.

    what: who needs it, as the message begins.
    """
    if missing := [package for package in TRAIN if find_spec(package) is None]:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}; install with: pip install 'manifold-hc[train]'"
        )

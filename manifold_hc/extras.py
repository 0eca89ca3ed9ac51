"""Optional dependencies: the extra `train` installs the packages of commands and trainer."""

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


def require_train(feature: str) -> None:
    """Raise MissingExtraError if a package of the extra `train` is missing; import none of them.

    feature: the command or module that needs the extra, first words of the message.
    """
    if missing := [package for package in TRAIN if find_spec(package) is None]:
        raise MissingExtraError(
            f"{feature} needs {', '.join(missing)}; install with: pip install 'manifold-hc[train]'"
        )

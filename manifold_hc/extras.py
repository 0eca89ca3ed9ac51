"""Optional dependencies, in groups that `pip install 'manifold-hc[NAME]'` installs: extras."""

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


EXTRAS = {
    "train": TRAIN,
    "transformers": ("transformers",),
    "peft": ("transformers", "peft"),
    "torchtitan": ("torchtitan",),
}
"""Import names of the packages that each extra installs."""


def require(feature: str, extra: str) -> None:
    """Raise MissingExtraError if a package of the extra is missing; import none of them.

    feature: the command or module that needs the extra, first words of the message.
    """
    if missing := [package for package in EXTRAS[extra] if find_spec(package) is None]:
        raise MissingExtraError(
            f"{feature} needs {', '.join(missing)}; "
            f"install with: pip install 'manifold-hc[{extra}]'"
        )


def require_train(feature: str) -> None:
    """Raise MissingExtraError if a package of the extra `train` is missing; import none of them."""
    require(feature, "train")

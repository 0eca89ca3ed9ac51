"""Reference implementations: the code of the libraries that the layouts belong to."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata

import torch

from manifold_hc.errors import MissingExtraError
from manifold_hc.interop.layouts import Checkpoint
from manifold_hc.numerics import PRESETS
from manifold_hc.verify.forward import StackSource
from manifold_hc.verify.observation import EXIT, Inputs, Observation, Source
from manifold_hc.verify.references.implementation import Implementation, Library
from manifold_hc.verify.references.liger import liger
from manifold_hc.verify.references.tile_kernels import tile_kernels
from manifold_hc.verify.references.transformers import deepseek_v4, glm5

__all__ = ["LIBRARIES", "Implementation", "Library", "Reference", "library_of", "reference_of"]

TRANSFORMERS = Library("transformers", "deepseek_v4", "transformers", deepseek_v4)
GLM5 = replace(TRANSFORMERS, part="glm5_next", build=glm5, numerics="glm5")
TILE_KERNELS = Library("tile-kernels", "torch reference", "tile_kernels", tile_kernels)
LIGER = Library(
    "liger-kernel",
    "LigerMHC's operators",
    "liger",
    liger,
    precision=torch.float32,
    streams=(2, 4, 8, 16),
)

LIBRARIES = (TRANSFORMERS, GLM5, TILE_KERNELS, LIGER)
"""Libraries that other people wrote."""


def library_of(checkpoint: Checkpoint) -> Library:
    """Return the reference implementation of a checkpoint's layout.

    Raises MissingExtraError where no released package has one.
    """
    name = checkpoint.layout.name
    if name == "deepseek_v4":
        name = "transformers"
    glm5_exit = checkpoint.config.exit_rule == PRESETS["glm5"].exit
    for library in LIBRARIES:
        if library.layout == name and (library.numerics == "glm5") == (
            name == "transformers" and glm5_exit
        ):
            return library
    raise MissingExtraError(
        f"mhc verify: a package must have the reference implementation of layout {name} but none "
        "does; record tensors of yours and give them with --recorded FILE"
    )


def reference_of(checkpoint: Checkpoint, tokens: int = 16, seed: int = 0) -> Source:
    """Return the reference implementation of a checkpoint's layout, on random inputs.

    Of our own layout it is our forward pass in float32 on the backend of the configuration, which
    `compare` judges by float64.
    """
    if checkpoint.layout.name != "manifold":
        return Reference(checkpoint, tokens, seed)
    sizes = tokens, checkpoint.config.n, checkpoint.channels, seed
    name = f"manifold-hc {metadata.version('manifold-hc')}, float32"
    return StackSource(checkpoint.stack(), Inputs(*sizes, torch.float32), name)


class Reference:
    """The reference implementation of a checkpoint's layout, on random inputs.

    It takes the tensors as they are in the files, so that neither our reading of them nor our
    forward pass is part of its results.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: int = 16, seed: int = 0) -> None:
        """Build the library's code; MissingExtraError if the package is not installed."""
        library = library_of(checkpoint)
        self.precision = library.precision
        self.name = " ".join(filter(None, (library.package, library.version, library.part)))
        self._checkpoint = checkpoint
        self._code: Implementation = library.build(checkpoint.config, checkpoint.channels)
        self._inputs = Inputs(
            tokens, checkpoint.config.n, checkpoint.channels, seed, library.precision
        )

    def observations(self) -> Iterator[Observation]:
        """Yield every sublayer in depth order, then the exit if the library has one.

        A library without single pass reads with a sublayer's own pre: its u is then left out.
        """
        single_pass = self._checkpoint.config.is_single_pass
        for index in range(self._checkpoint.sublayers):
            x, y = self._inputs.of(index)
            assert y is not None  # only the exit has none
            results = self._code.sublayer(index, self._tensors(index), x, y)
            if single_pass:
                results.pop("u", None)
            yield Observation(index, self._inputs.of(index), results)
        if self._code.exit is not None:
            inputs = self._inputs.of(EXIT)
            h = self._code.exit(self._tensors(EXIT), inputs.x)
            yield Observation(EXIT, inputs, {"h": h})

    def _tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Return the parameters of a sublayer or of the exit as the files have them."""
        names, files = self._checkpoint.layout.names, self._checkpoint.files
        first = "exit" if index == EXIT else f"connections.{index}.maps"
        places = [place for name in ("phi", "alpha", "bias") for place in names.places(f"{first}.{name}")]
        found = {place.field.name: names.name(place, self._checkpoint.prefix) for place in places}
        fold = names.fold_place(index)
        if fold is not None and (name := names.name(fold, self._checkpoint.prefix)) in files:
            found[fold.field.name] = name
        return {field: files[name].to(self.precision) for field, name in found.items() if name in files}

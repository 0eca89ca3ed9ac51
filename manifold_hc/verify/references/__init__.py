"""Reference implementations: the code of the libraries that the layouts belong to."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import NamedTuple

import torch

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError, MissingExtraError
from manifold_hc.interop.layouts import Checkpoint, Layout
from manifold_hc.numerics import PRESETS
from manifold_hc.verify.forward import StackSource
from manifold_hc.verify.observation import EXIT, Inputs, Observation, Source, Streams
from manifold_hc.verify.references import liger, tile_kernels, transformers
from manifold_hc.verify.references.implementation import Library

__all__ = ["LIBRARIES", "Library", "Reference", "library_of", "reference_of"]

TRANSFORMERS = Library("transformers", "deepseek_v4", "transformers", transformers.deepseek_v4)
GLM5 = replace(TRANSFORMERS, part="glm5_next", build=transformers.glm5, numerics="glm5")
TILE_KERNELS = Library("tile-kernels", "torch reference", "tile_kernels", tile_kernels.build)
LIGER = Library(
    "liger-kernel",
    "LigerMHC's operators",
    "liger",
    liger.build,
    precision=torch.float32,
    in_triton=True,
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


class Case(NamedTuple):
    """One sublayer, or the exit, for a library to compute."""

    sublayer: int
    """Its index, or EXIT."""
    inputs: Streams
    tensors: dict[str, torch.Tensor]


def run_cases(
    library: Library, config: ConnectionConfig, channels: int, cases: Sequence[Case]
) -> list[dict[str, torch.Tensor]]:
    """Compute the results of every case by the library's code; none for an exit it does not have.

    A library without single pass reads with a sublayer's own pre: its u is then left out.
    """
    code = library.build(config, channels)
    results = []
    for index, (x, y), tensors in cases:
        if y is None:
            results.append({} if code.exit is None else {"h": code.exit(tensors, x)})
            continue
        found = code.sublayer(index, tensors, x, y)
        if config.is_single_pass:
            found.pop("u", None)
        results.append(found)
    return results


class Reference:
    """The reference implementation of a checkpoint's layout, on random inputs.

    It takes the tensors as they are in the files, so that neither our reading of them nor our
    forward pass is part of its results.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: int = 16, seed: int = 0) -> None:
        """Find the library that has the implementation.

        Raises MissingExtraError if none has it, ConfigError if it does not take n streams.
        """
        self._library = library_of(checkpoint)
        if self._library.streams and checkpoint.config.n not in self._library.streams:
            raise ConfigError(
                f"mhc verify: {self._library.package} takes {self._library.streams} streams but "
                f"the checkpoint has {checkpoint.config.n}; give --recorded FILE"
            )
        self.precision = self._library.precision
        parts = self._library.package, self._library.version, self._library.part
        self.name = " ".join(filter(None, parts))
        self._checkpoint = checkpoint
        self._inputs = Inputs(
            tokens, checkpoint.config.n, checkpoint.channels, seed, self.precision
        )

    def observations(self) -> Iterator[Observation]:
        """Yield every sublayer in depth order, then the exit if the library has one.

        Raises MissingExtraError if the package is not installed.
        """
        one = self._checkpoint
        names, indices = sort_names(one.layout, one.used), (*range(one.sublayers), EXIT)
        cases = [
            Case(index, self._inputs.of(index), self._tensors(names.get(index, {})))
            for index in indices
        ]
        results = self._library.run(run_cases, self._library, one.config, one.channels, cases)
        for case, found in zip(cases, results, strict=True):
            if found:
                yield Observation(case.sublayer, case.inputs, found)

    def _tensors(self, names: dict[str, str]) -> dict[str, torch.Tensor]:
        """Read the parameters of a sublayer or of the exit as the files have them."""
        files = self._checkpoint.files
        return {field: files[name].to(self.precision) for field, name in names.items()}


def sort_names(layout: Layout, names: Iterable[str]) -> dict[int, dict[str, str]]:
    """Return the names of every sublayer's tensors, by the last part of the names."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name in names:
        if placed := layout.names.place(name):
            _, place = placed
            found[place.sublayer][place.field.name] = name
    return found

"""Strict reading: every tensor of a file gets its place, is named as another's, or is a problem."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from manifold_hc.interop.layouts.names import PREDICTION, Names, Place
from manifold_hc.interop.layouts.native import EXIT, parse_native, streams_of, transpose_res

Shape = tuple[int, ...]

NUMBER = r"\d+"


@dataclass(frozen=True)
class Found:
    """Connection tensors of a file, by place."""

    prefix: str
    """First part of their names."""
    places: dict[Place, str]
    """Their names."""
    strays: tuple[str, ...]
    """Names with a place but another prefix."""
    doubles: dict[str, str]
    """Names whose place another tensor has, each with that one's name."""
    other: tuple[str, ...]
    """Names without a place: branches, embeddings, norms, multi-token prediction."""

    @property
    def sublayers(self) -> int:
        """Number of sublayers up to the last one that is there."""
        return 1 + max((place.sublayer for place in self.places), default=-1)

    @property
    def has_exit(self) -> bool:
        """True if a tensor of a learned exit is there."""
        return any(place.sublayer == EXIT for place in self.places)


@dataclass
class Problems:
    """Differences between the tensors that are there and those that are wanted."""

    missing: list[str] = field(default_factory=list)
    """Tensors that are not there, with the name that may stand for it."""
    extra: list[str] = field(default_factory=list)
    """Tensors that look like a connection's and have no place."""
    shapes: list[str] = field(default_factory=list)
    """Tensors with another shape than wanted."""
    dtypes: list[str] = field(default_factory=list)
    """Tensors that are not floating point."""

    @property
    def all(self) -> list[str]:
        """Every problem, as text."""
        return [*self.missing, *self.extra, *self.shapes, *self.dtypes]


def find(names: Names, given: Iterable[str]) -> Found:
    """Sort the names of a file into connection tensors, by place, and others."""
    placed: list[tuple[str, str, Place]] = []
    other = []
    for name in given:
        found = None if PREDICTION.fullmatch(name) else names.place(name)
        if found is None:
            other.append(name)
        else:
            placed.append((name, *found))
    counts = Counter(prefix for _, prefix, _ in placed)
    prefix = max(counts, key=lambda text: (counts[text], -len(text))) if counts else names.prefix
    places: dict[Place, str] = {}
    doubles = {}
    for name, first, place in placed:
        if first == prefix and places.setdefault(place, name) != name:
            doubles[name] = places[place]
    return Found(
        prefix=prefix,
        places=places,
        doubles=doubles,
        strays=tuple(name for name, first, _ in placed if first != prefix),
        other=tuple(other),
    )


def sizes(found: Found, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Return streams n and phi's width nC as most tensors have them; None if no shape tells.

    A few tensors of another shape, such as a transposed one, change nothing.
    """
    shapes = [
        (place.field, tuple(tensors[name].shape))
        for place, name in found.places.items()
        if place.sublayer != EXIT
    ]
    rows = Counter(shape[0] for one, shape in shapes if one.parameter == "bias" and len(shape) == 1)
    count = _most(rows)
    widths = Counter(
        _width(shape, count, one.transposed)
        for one, shape in shapes
        if one.parameter == "phi" and len(shape) == 2
    )
    return None if count is None else streams_of(count), _most(widths)


def _width(shape: Shape, rows: int | None, transposed: bool) -> int:
    """Return the width nC of phi: the size that is not the number of rows."""
    if rows in shape:
        return shape[1] if shape[0] == rows else shape[0]
    return shape[0] if transposed else shape[1]


def _most(counts: "Counter[int]") -> int | None:
    return max(counts, key=lambda value: counts[value]) if counts else None


def wanted(names: Names, shapes: Mapping[str, Shape]) -> dict[Place, Shape]:
    """Return the shape of every tensor that the native parameters `shapes` are stored in."""
    return {
        place: place.field.shape(shape)
        for native, shape in shapes.items()
        for place in names.places(native)
    }


def compare(
    names: Names, found: Found, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]
) -> Problems:
    """Compare the tensors that are there with those of the native parameters `shapes`."""
    want = wanted(names, shapes)
    problems, left = Problems(), [*found.strays, *found.other]
    for name, other in found.doubles.items():
        problems.extra.append(f"{name} has the place of {other}")
    for place, shape in want.items():
        if place in found.places:
            name = found.places[place]
            if difference := shape_difference(tuple(tensors[name].shape), shape):
                problems.shapes.append(f"{name} {difference}")
            continue
        name = names.name(place, found.prefix)
        meant = _meant(name, shape, left, tensors)
        if meant is not None:
            left.remove(meant)
        hint = "" if meant is None else f" (did you mean {meant}?)"
        problems.missing.append(f"{name} {list(shape)} is missing{hint}")
    folds = {names.fold_place(place.sublayer): place for place in want}
    for place, name in found.places.items():
        if not (dtype := tensors[name].dtype).is_floating_point:
            problems.dtypes.append(
                f"{name} is {str(dtype).removeprefix('torch.')}, not floating point"
            )
        if place in want:
            continue
        if place not in folds:
            problems.extra.append(f"{name} has no place")
        elif tuple(tensors[name].shape) != (width := want_width(want, place.sublayer),):
            problems.shapes.append(f"{name} is {list(tensors[name].shape)}, not [{width}]")
    for name in left:
        if name in found.strays:
            problems.extra.append(f"{name} does not begin with {found.prefix!r}")
        elif names.looks_like_connection(name) and not PREDICTION.fullmatch(name):
            problems.extra.append(f"{name} has no place")
    return problems


def want_width(want: Mapping[Place, Shape], sublayer: int) -> int:
    """Return the width nC of phi of a sublayer."""
    return next(
        shape[0] if place.field.transposed else shape[1]
        for place, shape in want.items()
        if place.sublayer == sublayer and place.field.parameter == "phi"
    )


def shape_difference(shape: Shape, want: Shape) -> str:
    """Describe a shape that is not the wanted one; "" if it is."""
    if shape == want:
        return ""
    if shape == want[::-1]:
        return f"is {list(shape)}, the transpose of {list(want)}"
    return f"is {list(shape)}, not {list(want)}"


def not_finite(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """Describe the tensors with NaN or infinite values, such as "NaN in layers.1.hc_ffn_fn"."""
    faults = []
    for name in names:
        value = tensors[name]
        value = value.float() if value.dtype.itemsize == 1 else value  # float8 has no tests
        kinds = [
            kind
            for kind, test in (("NaN", torch.isnan), ("infinite values", torch.isinf))
            if bool(test(value).any())
        ]
        if kinds:
            faults.append(f"{' and '.join(kinds)} in {name}")
    return faults


def _meant(
    name: str, shape: Shape, left: Collection[str], tensors: Mapping[str, Tensor]
) -> str | None:
    """Return the left-over name that `name` was renamed to: alike, of its layer and its shape."""
    same_layer = [other for other in left if re.findall(NUMBER, other) == re.findall(NUMBER, name)]
    likely = get_close_matches(name, same_layer, n=5, cutoff=0.6)
    fitting = (other for other in likely if tuple(tensors[other].shape) in (shape, shape[::-1]))
    return next(fitting, None)


def collect(
    names: Names, found: Found, tensors: Mapping[str, Tensor], native: Iterable[str], streams: int
) -> dict[str, Tensor]:
    """Return the native parameters; every place of theirs is known to be there."""
    return {one: _parameter(names, found, tensors, one, streams) for one in native}


def _parameter(
    names: Names, found: Found, tensors: Mapping[str, Tensor], native: str, streams: int
) -> Tensor:
    places = list(names.places(native))
    first = places[0].field
    if first.entry is not None:
        ordered = sorted(places, key=lambda place: place.field.entry or 0)
        entries = [tensors[found.places[place]].detach().reshape(()) for place in ordered]
        return torch.stack(entries)
    value = tensors[found.places[places[0]]]
    value = _copy(value.mT if first.transposed else value)
    sublayer = places[0].sublayer
    if names.swaps_res and sublayer != EXIT and first.parameter != "alpha":
        value = transpose_res(value, streams)
    fold = names.fold_place(sublayer)
    if fold in found.places and first.parameter == "phi":
        value = value * tensors[found.places[fold]]
    return value


def spread(
    names: Names, native: Mapping[str, Tensor], streams: int, prefix: str | None
) -> dict[str, Tensor]:
    """Return the tensors of a layout that hold the native parameters; the reverse of `collect`."""
    tensors = {}
    for one, value in native.items():
        sublayer, parameter = parse_native(one) or (EXIT, "phi")
        if names.swaps_res and sublayer != EXIT and parameter != "alpha":
            value = transpose_res(value, streams)
        for place in names.places(one):
            stored = value
            if place.field.entry is not None:
                stored = value[place.field.entry].reshape(place.field.entry_shape)
            if place.field.transposed:
                stored = value.mT
            tensors[names.name(place, prefix)] = _copy(stored)
    return tensors


def _copy(value: Tensor) -> Tensor:
    """Return a contiguous copy, which shares no memory with a model's parameters."""
    return value.detach().clone(memory_format=torch.contiguous_format)

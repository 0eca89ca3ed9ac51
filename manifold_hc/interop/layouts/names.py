"""Names and shapes of the connection tensors in the files of one library."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from manifold_hc.interop.layouts.native import EXIT, Parameter, parse_native

PREFIX = r"(?P<prefix>(?:[^.]+\.)*?)"
"""Any modules around the connections."""

LAYER_DIGITS = 4
"""Most digits of a layer's number: a name alone must not make a model of a billion layers."""

PREDICTION = re.compile(r"(?:.*\.)?mtp(?:_layers)?\..*")
"""Multi-token prediction: its connections belong to no sublayer of the main model."""


@dataclass(frozen=True)
class Field:
    """One tensor of a connection in a library's files."""

    name: str
    """Last part of its name."""
    parameter: Parameter
    """Native parameter that its values belong to."""
    entry: int | None = None
    """Entry of the native parameter that it holds; None for all of it."""
    entry_shape: tuple[int, ...] = ()
    """Shape of a single entry: [] or [1]."""
    transposed: bool = False
    """True if phi is stored [nC, rows]."""

    def shape(self, native: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tensor's shape for a native parameter of shape `native`."""
        if self.entry is not None:
            return self.entry_shape
        return native[::-1] if self.transposed else native


@dataclass(frozen=True)
class Place:
    """Position of one tensor: its sublayer, or EXIT, and its field."""

    sublayer: int
    field: Field


@dataclass(frozen=True)
class Names:
    """Names of all connection tensors of a model."""

    sublayers: tuple[str, ...]
    """Names of the sublayers of one layer, with {layer} and {field}."""
    fields: tuple[Field, ...]
    """Tensors of a sublayer."""
    exit: str | None = None
    """Name of the learned exit's tensors, with {field}; None without a learned exit."""
    exit_fields: tuple[Field, ...] = ()
    """Tensors of the learned exit."""
    prefix: str = ""
    """First part of the names that are written; any other is read too."""
    fold: str | None = None
    """Optional tensor [nC] that multiplies the columns of phi, and is folded into it."""
    swaps_res: bool = False
    """True if the n*n rows of phi and bias are ours transposed."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Parts of names behind a prefix that is not the layout's own, each with the usual part."""
    module: str = ""
    """Module that holds a block's part of the connections: all before its name is left out."""
    marker: str = ""
    """Pattern of names that look like a connection's."""

    def place(self, name: str) -> tuple[str, Place] | None:
        """Return prefix and place of a tensor; None if the name is no connection's."""
        for alias, part in self.aliases:
            name = name.replace(alias, part)
        if self.module:
            name = re.sub(rf"(?:[^.]+\.)*{self.module}\.", "", name)
        for pattern, index, fields in self._patterns:
            if match := pattern.fullmatch(name):
                layer = EXIT if index == EXIT else int(match["layer"])
                sublayer = EXIT if index == EXIT else layer * len(self.sublayers) + index
                return match["prefix"], Place(sublayer, fields[match["field"]])
        return None

    def name(self, place: Place, prefix: str | None = None) -> str:
        """Return the name of the tensor at a place; `prefix` None for the layout's own."""
        first = self.prefix if prefix is None else prefix
        if place.sublayer == EXIT:
            name = str(self.exit).format(field=place.field.name)
        else:
            layer, index = divmod(place.sublayer, len(self.sublayers))
            name = self.sublayers[index].format(layer=layer, field=place.field.name)
        for alias, part in self.aliases if first != self.prefix else ():
            name = name.replace(part, alias)
        return first + name

    def places(self, native: str) -> Iterator[Place]:
        """Yield the places that hold the values of the native parameter `native`."""
        if found := parse_native(native):
            sublayer, parameter = found
            for field in self.exit_fields if sublayer == EXIT else self.fields:
                if field.parameter == parameter:
                    yield Place(sublayer, field)

    def fold_place(self, sublayer: int) -> Place | None:
        """Return the place of the optional tensor that multiplies phi, if the layout has one."""
        return None if self.fold is None else Place(sublayer, Field(self.fold, "phi"))

    def example(self) -> str:
        """Return the name of one tensor of a sublayer."""
        return self.prefix + self.sublayers[0].format(layer="N", field=self.fields[0].name)

    def looks_like_connection(self, name: str) -> bool:
        """Return True if a name has the words of a connection but may have no place."""
        return bool(self.marker) and re.search(self.marker, name) is not None

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], int, dict[str, Field]]]:
        """Pattern of the names of each sublayer of a layer, and of the exit."""
        optional = () if self.fold is None else (Field(self.fold, "phi"),)
        templates = [(name, index, self.fields) for index, name in enumerate(self.sublayers)]
        if self.exit is not None:
            templates.append((self.exit, EXIT, self.exit_fields))
        return [
            (_pattern(name, named), index, named)
            for name, index, fields in templates
            if (named := {field.name: field for field in (*fields, *optional)})
        ]


def _pattern(template: str, fields: dict[str, Field]) -> re.Pattern[str]:
    groups = {
        "{layer}": rf"(?P<layer>0|[1-9]\d{{0,{LAYER_DIGITS - 1}}})",
        "{field}": f"(?P<field>{'|'.join(map(re.escape, fields))})",
    }
    parts = re.split(r"(\{layer\}|\{field\})", template)
    return re.compile(PREFIX + "".join(groups.get(part, re.escape(part)) for part in parts))

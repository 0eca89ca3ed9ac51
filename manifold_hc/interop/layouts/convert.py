"""Conversion of a checkpoint from one layout to another, with every difference stated."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.interop.layouts import reading
from manifold_hc.interop.layouts.checkpoint import Checkpoint
from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.native import EXIT, MATRICES, parse_native, transpose_res
from manifold_hc.interop.layouts.settings import metadata_of
from manifold_hc.numerics import PRESETS, Numerics, preset


@dataclass(frozen=True)
class Conversion:
    """Tensors of a model in another layout."""

    source: Checkpoint
    """Model that they come from."""
    layout: Layout
    """Layout of the tensors."""
    config: ConnectionConfig
    """Configuration of ours that computes the same as the source, with these parameters; without
    those of an exit that the layout has no place for, the layout's first exit takes its place."""
    connections: dict[str, Tensor]
    """Tensors of the connections."""
    kept: tuple[str, ...]
    """Names of the other tensors, which are written unchanged."""
    dropped: tuple[str, ...]
    """Names of the source's tensors of an exit that the layout has no place for."""
    notes: tuple[str, ...]
    """Settings and differences that the tensors do not hold."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the tensors of the source that are neither used nor kept."""
        kept = set(self.kept)
        others = tuple(name for name in self.source.other if name not in kept)
        return (*self.dropped, *others)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file, from which the configuration is read again."""
        return metadata_of(self.layout, self.config, self.source.channels)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the file by name; the kept ones are read one after the other."""
        yield from self.connections.items()
        for name in self.kept:
            yield name, self.source.files[name]


def convert(
    source: Checkpoint,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    connections_only: bool = False,
    inexact: bool = False,
) -> Conversion:
    """Convert the connections of a model to another layout.

    The parameters keep every bit, unless `dtype` is narrower than theirs. Other tensors are kept
    under their names if the layout belongs to the same family of models.

    Args:
        source: The model.
        layout: Layout of the result.
        dtype: Of the connections' tensors; None for the source's.
        connections_only: True to leave other tensors out where they cannot be kept.
        inexact: True to convert although the library computes another function, or values are not
            finite; it is noted, and an exit that the library has no place for is left out.

    Returns:
        The tensors, and notes on the parts of the model that they do not hold.

    Raises:
        CheckpointError: If the layout has no place for the parameters, its library computes
            another function with them, or values are not finite.
        ConfigError: If other tensors cannot be kept and `connections_only` is False.
    """
    require_matrices(source, layout)
    config, native = adapt(source, layout)
    faults = source.not_finite()
    if faults and not inexact:
        raise CheckpointError(
            f"{source.files.path}: connections must be finite but there are {'; '.join(faults)}; "
            "--inexact copies them all the same"
        )
    problems = list(obstacles(config, layout))
    if problems and not inexact:
        raise CheckpointError(
            f"{source.files.path}: {layout.name} cannot compute the same: {'; '.join(problems)}; "
            "inexact converts the parameters all the same"
        )
    dropped = _exit_names(source) if layout.names.exit is None else ()
    if dropped:
        native = {name: value for name, value in native.items() if not name.startswith("exit.")}
        config = replace(config, exit=layout.exits[0])
    kept = _kept(source, layout, connections_only)
    prefix = source.prefix if kept or layout is source.layout else None
    connections = layout.from_native(native, prefix)
    if dtype is not None:
        connections = {name: tensor.to(dtype) for name, tensor in connections.items()}
        if not faults and (large := reading.not_finite(connections, connections)):
            raise CheckpointError(
                f"{source.files.path}: values are too large for {_names([dtype])}: "
                f"{'; '.join(large)}; choose a dtype of a larger range"
            )
    notes = (
        *problems,
        *faults,
        *_notes(source, layout, config),
        *_dtypes(source.native, connections),
    )
    return Conversion(source, layout, config, connections, kept, dropped, notes)


def require_matrices(source: Checkpoint, layout: Layout) -> None:
    """Raise CheckpointError for connections that a library has no parameters for."""
    config = source.config
    dynamic = config.kind == "mhc" and config.dynamic and not config.disable
    if layout.name == "manifold" or (dynamic and config.constraint in MATRICES):
        return
    raise CheckpointError(
        f"{source.files.path}: {layout.name} takes dynamic mHC with n*n logits and no map disabled "
        f"but the connections are {config.kind}, dynamic={config.dynamic}, "
        f"constraint={config.constraint}, disable={','.join(config.disable) or 'none'}"
    )


def adapt(source: Checkpoint, layout: Layout) -> tuple[ConnectionConfig, dict[str, Tensor]]:
    """Return configuration and parameters in the layout's numerics that compute the same.

    The presets differ by epsilons, which the configuration keeps, and by the direction of the n*n
    rows, which are transposed. The layout manifold takes any configuration as it is.
    """
    config, native = source.config, source.native
    if layout.name == "manifold" or layout.numerics == config.numerics:
        return config, native
    ours, theirs = numerics_of(config), PRESETS[layout.numerics]
    if ours.res_is_transposed != theirs.res_is_transposed:
        native = {name: _turned(name, value, config.n) for name, value in native.items()}
    changed = replace(
        config,
        numerics=layout.numerics,
        norm_eps=ours.norm_eps,
        hc_eps=None if layout.numerics == "paper" else ours.hc_eps,
        exit=config.exit_rule,
        single_pass=config.is_single_pass,
    )
    return changed, native


def numerics_of(config: ConnectionConfig) -> Numerics:
    """Return the preset of a configuration with its own epsilons."""
    return preset(config.numerics, norm_eps=config.norm_eps, hc_eps=config.hc_eps)


def _turned(name: str, value: Tensor, n: int) -> Tensor:
    sublayer, parameter = parse_native(name) or (-1, "alpha")
    return value if sublayer < 0 or parameter == "alpha" else transpose_res(value, n)


def obstacles(config: ConnectionConfig, layout: Layout) -> Iterator[str]:
    """Yield the reasons why a library cannot compute the same with any parameters."""
    if layout.name == "manifold":
        return
    if config.mixing != layout.constraint:
        yield f"its constraint is {layout.constraint}, not {config.mixing}"
    if config.exit_rule not in layout.exits:
        yield f"its exit is {' or '.join(layout.exits)}, not {config.exit_rule}"


def _exit_names(source: Checkpoint) -> tuple[str, ...]:
    """Return the names of the source's tensors of a learned exit."""
    placed = ((name, source.layout.names.place(name)) for name in source.used)
    return tuple(name for name, found in placed if found and found[1].sublayer == EXIT)


def _kept(source: Checkpoint, layout: Layout, connections_only: bool) -> tuple[str, ...]:
    """Return the names of the other tensors that are written too."""
    if layout.family == source.layout.family:
        return () if connections_only else source.other
    if source.other and not connections_only:
        raise ConfigError(
            f"{source.files.path}: {len(source.other)} tensors are no connections and have other "
            f"names in models with {layout.name} connections ({_some(source.other)}); "
            "--connections-only leaves them out"
        )
    return ()


def _notes(source: Checkpoint, layout: Layout, config: ConnectionConfig) -> Iterator[str]:
    """Yield the settings that the model must be given, and the library's differences."""
    if source.assumed:
        values = ", ".join(f"{name}={getattr(config, name)}" for name in source.assumed)
        yield f"no file gives {values}: taken from the layout {source.layout.name}"
    if layout.name == "manifold":
        return
    if config.exit_rule != source.config.exit_rule:
        yield f"the learned exit is left out: the metadata of the file says {config.exit_rule}"
    actual = numerics_of(source.config)
    for name, value, default in (
        ("iterations", config.iterations, layout.iterations),
        ("norm_eps", actual.norm_eps, layout.norm_eps),
        ("hc_eps", actual.hc_eps, layout.hc_eps),
    ):
        if value != default:
            set_it = "has no setting for it" if name in layout.fixed else "needs it to be set"
            yield f"{name} is {value:g}, not {layout.name}'s {default:g}: {layout.name} {set_it}"
    if layout.difference and layout is not source.layout:
        yield layout.difference


def _dtypes(native: Mapping[str, Tensor], connections: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a note for connections that are not float32, or were rounded to a narrower dtype."""
    before = {value.dtype for value in native.values()}
    after = {value.dtype for value in connections.values()}
    if narrowed := [d for d in before if any(torch.promote_types(d, a) != a for a in after)]:
        yield f"values are rounded from {_names(narrowed)} to {_names(after)}"
    if after != {torch.float32}:
        yield f"connections are {_names(after)}; --dtype float32 widens narrower ones exactly"


def _names(dtypes: "set[torch.dtype] | list[torch.dtype]") -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

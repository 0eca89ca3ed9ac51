"""A layout: the names of a library's connection tensors, and the conventions behind them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.constraints import ConstraintName
from manifold_hc.errors import CheckpointError
from manifold_hc.interop.layouts import reading
from manifold_hc.interop.layouts.names import Names
from manifold_hc.interop.layouts.native import native_shapes, parse_native, streams_of
from manifold_hc.interop.layouts.reading import Found
from manifold_hc.numerics import ExitName, NumericsName


@dataclass(frozen=True)
class Sizes:
    """Sizes of the connections of a model, and the configuration that they belong to."""

    config: ConnectionConfig
    channels: int
    sublayers: int


@dataclass(frozen=True)
class Layout:
    """Names and conventions of one library, and the configuration with which ours equals it."""

    name: str
    """Name of the layout, for `mhc convert --to`."""
    source: str
    """Library and version that the layout was compared with."""
    family: str
    """Layouts of one family belong to the same models: their other tensors need no renaming."""
    names: Names
    """Names and shapes of the tensors."""
    order: str
    """Order of the rows of phi and bias, and of the normalisations of `res`."""
    direction: str
    """Meaning of an entry of the n*n rows."""
    norm_eps: float
    """Epsilon of the RMS norm over the nC stream values."""
    norm_eps_place: Literal["inside the root", "outside the root"]
    """Place of that epsilon."""
    hc_eps: float
    """Epsilon of pre and of Sinkhorn-Knopp."""
    post_factor: float
    """Factor of the sigmoid of post."""
    iterations: int
    """Default number of Sinkhorn-Knopp iterations."""
    exit: ExitName | None
    """Reduction of the streams after the last sublayer; None if the library leaves it to users."""
    exits: tuple[ExitName, ...]
    """Reductions that models of the library can have, or that its users can write."""
    numerics: NumericsName
    """Numerics of the configuration whose forward pass equals the library's."""
    constraint: ConstraintName
    """Constraint of that configuration."""
    fixed: tuple[str, ...] = ()
    """Fields of the configuration that the library has no setting for."""
    difference: str = ""
    """Detail of the library's forward pass that no configuration has, and its size."""

    def config(self, streams: int) -> ConnectionConfig:
        """Return the configuration whose forward pass equals the library's with its defaults.

        The exit is the mean if the library leaves it to its users and has no tensors for it.
        """
        left_to_users = self.exit is None and self.names.exit is None
        return ConnectionConfig(
            kind="mhc",
            streams=streams,
            numerics=self.numerics,
            constraint=self.constraint,
            iterations=self.iterations,
            norm_eps=self.norm_eps,
            hc_eps=self.hc_eps or None,
            exit="mean" if left_to_users else self.exit,
        )

    def to_native(
        self, tensors: Mapping[str, Tensor], config: ConnectionConfig | None = None
    ) -> dict[str, Tensor]:
        """Return the parameters of a Stack from a model's tensors; values keep every bit.

        Args:
            tensors: By name; those of branches, norms and embeddings are left out.
            config: Configuration of the Stack; None for the library's defaults, with a learned exit
                if the tensors have one.

        Returns:
            The parameters by the names of `Stack.state_dict()`.

        Raises:
            CheckpointError: For tensors that are missing, left over, transposed or renamed; the
                message names all of them.

        Example:
            >>> import torch
            >>> from manifold_hc.interop.layouts import LAYOUTS
            >>> shapes = {"fn": (8, 6), "base": (8,), "scale": (3,)}  # 2 streams of 3 channels
            >>> head = {"fn": (2, 6), "base": (2,), "scale": (1,)}
            >>> tensors = {f"hc_head_{name}": torch.ones(shape) for name, shape in head.items()}
            >>> for sublayer in ("attn", "ffn"):
            ...     for name, shape in shapes.items():
            ...         tensors[f"layers.0.hc_{sublayer}_{name}"] = torch.ones(shape)
            >>> native = LAYOUTS["deepseek_v4"].to_native(tensors)
            >>> native["connections.1.maps.phi"].shape
            torch.Size([8, 6])
        """
        found = reading.find(self.names, tensors)
        sizes = self.measure(found, tensors, config)
        self.require(found, tensors, sizes)
        return self.collect(found, tensors, sizes)

    def from_native(
        self, native: Mapping[str, Tensor], prefix: str | None = None
    ) -> dict[str, Tensor]:
        """Return this layout's tensors from the parameters of a Stack; the reverse of `to_native`.

        Args:
            native: Parameters by the names of `Stack.state_dict()`, of dynamic mHC with n*n logits.
            prefix: First part of the names; None for the layout's own.

        Returns:
            The tensors by the library's names.

        Raises:
            CheckpointError: For parameters that the layout has no tensor for.

        Example:
            >>> import manifold_hc as mhc
            >>> from manifold_hc.interop.layouts import LAYOUTS
            >>> layout = LAYOUTS["liger"]
            >>> stack = mhc.Stack(3, layout.config(streams=2), sublayers=4)
            >>> tensors = layout.from_native(stack.state_dict())
            >>> tensors["0.phi"].shape, tensors["0.alpha_pre"].shape
            (torch.Size([6, 8]), torch.Size([]))
        """
        unknown = [name for name in native if parse_native(name) is None]
        placeless = [name for name in native if name not in unknown and not self.holds(name)]
        if unknown or placeless:
            raise CheckpointError(
                f"{self.name}: has no place for {', '.join([*unknown, *placeless])}; "
                f"it takes {self.holdings()}"
            )
        streams = self._streams(native)
        return reading.spread(self.names, native, streams, prefix)

    def holds(self, native: str) -> bool:
        """Return True if the layout has a tensor for the native parameter."""
        return any(True for _ in self.names.places(native))

    def holdings(self) -> str:
        """Describe the native parameters that the layout has tensors for."""
        exit = "" if self.names.exit is None else " and those of a learned exit"
        return f"phi, alpha and bias of sublayers{exit}"

    def _streams(self, native: Mapping[str, Tensor]) -> int:
        """Return n from the first bias; raise CheckpointError for other than n*n logits."""
        for name, value in native.items():
            sublayer, parameter = parse_native(name) or (-1, "phi")
            if sublayer >= 0 and parameter == "bias":
                if (streams := streams_of(value.shape[0])) or self.name == "manifold":
                    return streams or 0
                raise CheckpointError(
                    f"{self.name}: connections must have n*n + 2n rows but {name} has "
                    f"{value.shape[0]}; only the layout manifold takes other constraints"
                )
        raise CheckpointError(
            f"{self.name}: there must be a bias of a sublayer but the tensors are "
            f"{', '.join(native) or 'none'}"
        )

    def measure(
        self,
        found: Found,
        tensors: Mapping[str, Tensor],
        config: ConnectionConfig | None = None,
        channels: int | None = None,
        layers: int | None = None,
    ) -> Sizes:
        """Return the sizes of the connections, by the tensors' shapes where they are not given.

        config: configuration of the connections; None for the library's defaults, with a learned
        exit if the tensors have one. Raises CheckpointError if no shape gives a size.
        """
        streams, width = reading.sizes(found, tensors)
        if config is None and streams is not None:
            config = self.config(streams)
            config = replace(config, exit="learned") if found.has_exit else config
        if config is not None and width is not None:
            channels = width if config.kind == "hc" else width // config.n
        if config is None or channels is None or not found.sublayers:
            raise CheckpointError(
                f"{self.name}: shapes of phi and bias must give streams and channels but "
                f"{len(found.places)} tensors are connections'; names are such as "
                f"{self.names.example()}"
            )
        per_layer = len(self.names.sublayers)
        return Sizes(config, channels, per_layer * (layers or -(-found.sublayers // per_layer)))

    def require(self, found: Found, tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
        """Raise CheckpointError, which names every problem, unless all tensors fit the sizes."""
        shapes = native_shapes(sizes.config, sizes.channels, sizes.sublayers)
        if placeless := [name for name in shapes if not self.holds(name)]:
            raise CheckpointError(
                f"{self.name}: must hold {', '.join(placeless[:3])} for {sizes.config.kind} "
                f"connections with exit {sizes.config.exit_rule} but has no such tensors; it takes "
                f"{self.holdings()}"
            )
        problems = reading.compare(self.names, found, tensors, shapes).all
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise CheckpointError(f"{self.name}: {count}: {'; '.join(problems)}")

    def collect(
        self, found: Found, tensors: Mapping[str, Tensor], sizes: Sizes
    ) -> dict[str, Tensor]:
        """Return the native parameters of tensors that `require` has accepted."""
        native = native_shapes(sizes.config, sizes.channels, sizes.sublayers)
        return reading.collect(self.names, found, tensors, native, sizes.config.n)

"""What joins a sublayer to the rest of the network, as numbers and names."""

from dataclasses import dataclass
from typing import Literal

from manifold_hc import constraints
from manifold_hc.constraints import ConstraintName
from manifold_hc.errors import ConfigError, require_at_least_one, require_number, shown
from manifold_hc.kernels import backends
from manifold_hc.kernels.operators import FUSED_CONSTRAINTS
from manifold_hc.numerics import LARGEST_FLOAT32, PRESETS, NumericsName, preset

Kind = Literal["residual", "hc", "mhc"]
Part = Literal["pre", "post", "res"]


@dataclass(frozen=True)
class ConnectionConfig:
    """What joins a sublayer to the rest of the network.

    Attributes:
        kind: residual, hc (arXiv 2409.19606) or mhc (arXiv 2512.24880).
        streams: Number n of residual streams, the papers' expansion rate; residual always has one.
        dynamic: Whether the coefficients depend on the token, or are plain parameters.
        constraint: What mHC's mixing matrix is made by.
        iterations: Sinkhorn-Knopp iterations, 1000 at most.
        numerics: mHC's preset of orders and epsilons.
        norm_eps: Epsilon inside the RMS norm of the streams; the preset's when left out.
        hc_eps: Epsilon of the deepseek_v4 preset, which alone has one; the preset's when left out.
        alpha: Initial gate of the dynamic part.
        phi_std: Standard deviation of the dynamic part's initial projection.
        disable: Parts replaced by constants, as in the paper's Table 1: pre 1/n, post 1, res
            identity.
        single_pass: Whether a sublayer reads with the `pre` of the one before it (DeepSeek-V4.1);
            in a Stack.
        backend: Which implementation computes the connection.
    """

    kind: Kind = "mhc"
    """residual, hc (arXiv 2409.19606) or mhc (arXiv 2512.24880)."""
    streams: int = 4
    """Number n of residual streams, the papers' expansion rate; residual always has one."""
    dynamic: bool = True
    """Whether the coefficients depend on the token, or are plain parameters."""
    constraint: ConstraintName = "sinkhorn"
    """What mHC's mixing matrix is made by."""
    iterations: int = 20
    """Sinkhorn-Knopp iterations, 1000 at most."""
    numerics: NumericsName = "paper"
    """mHC's preset of orders and epsilons."""
    norm_eps: float | None = None
    """Epsilon inside the RMS norm of the streams; the preset's when left out."""
    hc_eps: float | None = None
    """Epsilon of the deepseek_v4 preset, which alone has one; the preset's when left out."""
    alpha: float = 0.01
    """Initial gate of the dynamic part."""
    phi_std: float = 0.0
    """Standard deviation of the dynamic part's initial projection."""
    disable: tuple[Part, ...] = ()
    """Parts replaced by constants, as in the paper's Table 1: pre 1/n, post 1, res identity."""
    single_pass: bool = False
    """Whether a sublayer reads with the `pre` of the one before it (DeepSeek-V4.1); in a Stack."""
    backend: str = "auto"
    """Which implementation computes the connection."""

    def __post_init__(self) -> None:
        """Raise ConfigError for anything that cannot be built."""
        if self.kind not in ("residual", "hc", "mhc"):
            raise ConfigError(f"kind: must be residual, hc or mhc but is {self.kind!r}")
        for name in ("dynamic", "single_pass"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be True or False but is {getattr(self, name)!r}")
        require_at_least_one(self, "streams")
        most = constraints.MOST_ITERATIONS
        if isinstance(self.iterations, int) and self.iterations > most:
            raise ConfigError(
                f"iterations: must be at most {most} but is {shown(self.iterations)}; "
                "constraint=exact is what more of them tend to"
            )
        require_at_least_one(self, "iterations")
        require_number(self, "phi_std", "norm_eps", "hc_eps")
        if not isinstance(self.alpha, int | float) or not abs(self.alpha) <= LARGEST_FLOAT32:
            raise ConfigError(f"alpha: must be finite in float32 but is {self.alpha!r}")
        if self.backend not in ("auto", *backends()):
            raise ConfigError(
                f"backend: must be one of auto, {', '.join(backends())} but is {self.backend!r}"
            )
        if unknown := [part for part in self.disable if part not in ("pre", "post", "res")]:
            raise ConfigError(f"disable: takes any of pre, post, res but has {unknown[0]!r}")
        if self.single_pass and self.kind != "mhc":
            raise ConfigError(
                f"single_pass: only mhc reads a sublayer late but kind is {self.kind}; leave it out"
            )
        constraints.constraint(self.constraint, self.streams)
        preset(self.numerics, norm_eps=self.norm_eps, hc_eps=self.hc_eps)

    @property
    def n(self) -> int:
        """Streams the network really carries: `streams`, or 1 for residual."""
        return 1 if self.kind == "residual" else self.streams

    @property
    def mixing(self) -> ConstraintName:
        """The constraint, or the identity where res is disabled."""
        return "identity" if "res" in self.disable else self.constraint

    @property
    def is_one_pass(self) -> bool:
        """Whether one operator makes a token's coefficients and reads with them."""
        fused = self.dynamic and self.mixing in FUSED_CONSTRAINTS
        return self.kind == "mhc" and fused and "pre" not in self.disable

    @property
    def exit(self) -> Literal["mean", "sum", "learned", "pre"]:
        """How the streams become one after the last sublayer; "pre": weighted by its pre."""
        if self.single_pass:
            return "pre"
        if self.kind == "hc":
            return "sum"
        if self.kind == "residual":
            return "mean"
        return PRESETS[self.numerics].exit


def require_config(operation: str, config: object) -> ConnectionConfig:
    """The configuration, or the default one for None; ConfigError for anything else."""
    if config is None:
        return ConnectionConfig()
    if isinstance(config, ConnectionConfig):
        return config
    if isinstance(config, str):
        repair = f"mhc.ConnectionConfig(kind={config!r})"
    elif isinstance(config, dict):
        repair = "mhc.ConnectionConfig(**config)"
    else:
        repair = "mhc.ConnectionConfig(...)"
    raise ConfigError(
        f"{operation}: config must be a ConnectionConfig or None but is {config!r}, "
        f"a {type(config).__name__}; write {repair}"
    )

"""Configuration of the connections, and of the recompute of a stack."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from manifold_hc import constraints
from manifold_hc.constraints import CONSTRAINTS, ConstraintName
from manifold_hc.errors import ConfigError, require_at_least_one, require_number, shown
from manifold_hc.kernels import backends
from manifold_hc.numerics import LARGEST_FLOAT32, PRESETS, ExitName, NumericsName, preset

Kind = Literal["residual", "hc", "mhc"]
Part = Literal["pre", "post", "res"]

Recompute = int | Literal["none", "auto"] | None
"""Sublayers in a recompute block, "auto" for the length that holds least; None and "none" for off.
"""


@dataclass(frozen=True)
class ConnectionConfig:
    """Configuration of the connection around each sublayer; frozen, checked when it is built.

    Attributes:
        kind: residual, hc (arXiv 2409.19606) or mhc (arXiv 2512.24880).
        streams: Number n of residual streams, the papers' expansion rate; residual always has one.
        dynamic: True for coefficients computed from each token, False for plain parameters.
        constraint: Set of matrices that mHC's mixing matrix `res` is taken from.
        iterations: Sinkhorn-Knopp iterations, 1 to 1000.
        numerics: Preset of mHC's orders, epsilons, exit and passes: paper, deepseek_v4,
            deepseek_v41, glm5.
        norm_eps: Epsilon inside the RMS norm of the streams; None for the preset's.
        hc_eps: Epsilon of pre and of Sinkhorn-Knopp, which paper does not have; None for the
            preset's.
        alpha: Initial gate of the dynamic part.
        phi_std: Standard deviation of the initial projection phi.
        disable: Maps replaced by constants, as in the paper's Table 1: pre 1/n, post 1, res
            identity.
        exit: Reduction of the streams at the end: mean, sum, learned, pre; None for the preset's.
        single_pass: True if a sublayer reads with the `pre` of the one before (V4.1); None for the
            preset's.
        backend: Backend that computes the connection: auto, reference, cpu or triton.
        fuse_boundaries: True if a Stack computes a write, the next coefficients and the next read
            in one kernel.

    Raises:
        ConfigError: If a field has a wrong type or value, or two fields exclude each other.

    Example:
        >>> import manifold_hc as mhc
        >>> mhc.ConnectionConfig(kind="mhc", streams=4).mixing
        'sinkhorn'
    """

    kind: Kind = "mhc"
    """residual, hc (arXiv 2409.19606) or mhc (arXiv 2512.24880)."""
    streams: int = 4
    """Number n of residual streams, the papers' expansion rate; residual always has one."""
    dynamic: bool = True
    """True for coefficients computed from each token, False for plain parameters."""
    constraint: ConstraintName = "sinkhorn"
    """Set of matrices that mHC's mixing matrix `res` is taken from."""
    iterations: int = 20
    """Sinkhorn-Knopp iterations, 1 to 1000."""
    numerics: NumericsName = "paper"
    """Preset of mHC's orders, epsilons, exit and passes: paper, deepseek_v4, deepseek_v41, glm5."""
    norm_eps: float | None = None
    """Epsilon inside the RMS norm of the streams; None for the preset's."""
    hc_eps: float | None = None
    """Epsilon of pre and of Sinkhorn-Knopp, which paper does not have; None for the preset's."""
    alpha: float = 0.01
    """Initial gate of the dynamic part."""
    phi_std: float = 0.0
    """Standard deviation of the initial projection phi."""
    disable: tuple[Part, ...] = ()
    """Maps replaced by constants, as in the paper's Table 1: pre 1/n, post 1, res identity."""
    exit: ExitName | None = None
    """Reduction of the streams at the end: mean, sum, learned, pre; None for the preset's."""
    single_pass: bool | None = None
    """True if a sublayer reads with the `pre` of the one before (V4.1); None for the preset's."""
    backend: str = "auto"
    """Backend that computes the connection: auto, reference, cpu or triton."""
    fuse_boundaries: bool = True
    """True if a Stack computes a write, the next coefficients and the next read in one kernel."""

    def __post_init__(self) -> None:
        """Raise ConfigError for anything that cannot be built."""
        if self.kind not in ("residual", "hc", "mhc"):
            raise ConfigError(f"kind: must be residual, hc or mhc but is {self.kind!r}")
        for name in ("dynamic", "fuse_boundaries"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be True or False but is {getattr(self, name)!r}")
        if self.single_pass is not None and not isinstance(self.single_pass, bool):
            raise ConfigError(
                f"single_pass: must be True, False or None but is {self.single_pass!r}"
            )
        require_at_least_one(self, "streams")
        most = constraints.MOST_ITERATIONS
        if isinstance(self.iterations, int) and self.iterations > most:
            raise ConfigError(
                f"iterations: must be at most {most} but is {shown(self.iterations)}; "
                "constraint=exact is the limit of more iterations"
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
            raise ConfigError(f"single_pass: needs kind=mhc but kind is {self.kind}; leave it out")
        constraints.constraint(self.constraint, self.streams)
        preset(self.numerics, norm_eps=self.norm_eps, hc_eps=self.hc_eps)
        self._check_exit()

    def _check_exit(self) -> None:
        """Raise ConfigError for an exit that is unknown or that these connections do not have."""
        if self.exit is None:
            return
        if self.exit not in get_args(ExitName):
            raise ConfigError(
                f"exit: must be one of {', '.join(get_args(ExitName))} but is {self.exit!r}"
            )
        if self.exit == "pre" and not self.is_single_pass:
            raise ConfigError(
                "exit: pre needs single_pass=True, which hands every pre to the next reader"
            )
        if self.exit == "learned" and self.kind == "residual":
            raise ConfigError("exit: learned needs streams but kind is residual; leave it out")

    @property
    def n(self) -> int:
        """Number of streams in the network: `streams`, or 1 for residual."""
        return 1 if self.kind == "residual" else self.streams

    @property
    def mixing(self) -> ConstraintName:
        """Constraint of `res`, or identity if `res` is disabled."""
        return "identity" if "res" in self.disable else self.constraint

    @property
    def reads_in_kernel(self) -> bool:
        """True if a kernel can compute the coefficients and read with them in one pass.

        It needs dynamic mHC, a constraint that the kernels compute, and a learned `pre`.
        """
        in_kernel = self.dynamic and CONSTRAINTS[self.mixing].in_kernels
        return self.kind == "mhc" and in_kernel and "pre" not in self.disable

    @property
    def is_single_pass(self) -> bool:
        """True if each sublayer reads with the `pre` of the one before: the field, or the preset's.

        Residual connections and HC have no preset and are never single-pass.
        """
        if self.kind != "mhc":
            return False
        return PRESETS[self.numerics].single_pass if self.single_pass is None else self.single_pass

    @property
    def exit_rule(self) -> ExitName:
        """Reduction of the streams at the end: the field, or the default of kind and preset."""
        if self.exit is not None:
            return self.exit
        if self.kind == "mhc":
            if self.is_single_pass:
                return "pre"
            # V4.1's own exit needs the pre that only single pass hands on: V4's takes its place.
            own = PRESETS[self.numerics].exit
            return "learned" if own == "pre" else own
        return "sum" if self.kind == "hc" else "mean"


def require_config(operation: str, config: object) -> ConnectionConfig:
    """Return the configuration, or the default one for None; ConfigError for another type."""
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


def block_length(recompute: Recompute, sublayers: int, n: int) -> int | None:
    """Return the number of sublayers in a recompute block, or None if recompute is off.

    "auto" is the length L_r that minimises the memory held at once, `n ceil(L / L_r) + (n + 2) L_r`
    times C numbers a token (mHC, equation 20), the smallest such length.
    Raises ConfigError for a length below 1 or above `sublayers`.
    """
    if recompute in (None, "none"):
        return None
    if recompute == "auto":
        return min(
            range(1, sublayers + 1),
            key=lambda length: n * math.ceil(sublayers / length) + (n + 2) * length,
        )
    if isinstance(recompute, bool) or not isinstance(recompute, int):
        raise ConfigError(f'recompute: must be None, "auto" or a block length but is {recompute!r}')
    if not 1 <= recompute <= sublayers:
        raise ConfigError(
            f"recompute: a block must have 1 to {sublayers} sublayers, as many as the stack, "
            f'but has {recompute}; "auto" chooses'
        )
    return recompute

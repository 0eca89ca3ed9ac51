"""Numerics presets: the same mathematics in the details of the paper and of released models."""

from dataclasses import dataclass, replace
from typing import Literal

from manifold_hc.errors import ConfigError

NumericsName = Literal["paper", "deepseek_v4", "deepseek_v41", "glm5"]

ExitName = Literal["mean", "sum", "learned", "pre"]
"""Reduction of the streams after the last sublayer; "pre" weights them by its `pre`."""

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Numerics:
    """One preset: a field for every detail in which the implementations differ."""

    name: NumericsName
    norm_eps: float
    """Epsilon inside the root of the RMS norm over the nC stream values."""
    hc_eps: float
    """Epsilon added to pre, to the row softmax and to every Sinkhorn denominator."""
    res_is_transposed: bool
    """True if the n*n rows of phi and bias hold `comb[source, target]` instead of `res[o, i]`."""
    exit: ExitName
    """Reduction of the streams to one after the last sublayer."""
    single_pass: bool = False
    """True if each sublayer reads with the `pre` of the one before."""


PRESETS: dict[str, Numerics] = {
    # arXiv 2512.24880: columns first, rows last, no epsilon; the exit is a choice of this package.
    "paper": Numerics("paper", norm_eps=1e-20, hc_eps=0.0, res_is_transposed=False, exit="mean"),
    # arXiv 2606.19348 and its released code: softmax rows first, columns last, epsilons throughout.
    "deepseek_v4": Numerics(
        "deepseek_v4", norm_eps=1e-6, hc_eps=1e-6, res_is_transposed=True, exit="learned"
    ),
    # DeepSeek-V4.1: the coefficients of V4; the exit weights the streams by the last pre.
    "deepseek_v41": Numerics(
        "deepseek_v41",
        norm_eps=1e-6,
        hc_eps=1e-6,
        res_is_transposed=True,
        exit="pre",
        single_pass=True,
    ),
    # GLM-5.3 (`glm5_next`): the coefficients of V4 with its own norm epsilon, and no learned exit.
    "glm5": Numerics("glm5", norm_eps=1e-5, hc_eps=1e-6, res_is_transposed=True, exit="mean"),
}


def preset(name: str, *, norm_eps: float | None = None, hc_eps: float | None = None) -> Numerics:
    """Return the preset `name`, with its epsilons replaced where they are given.

    Raises ConfigError for an unknown name, for an `hc_eps` with "paper", which has none, and for
    epsilons below 0 or not finite in float32.
    """
    if name not in PRESETS:
        raise ConfigError(f"numerics: must be one of {', '.join(PRESETS)} but is {name!r}")
    chosen = PRESETS[name]
    if hc_eps is not None and name == "paper":
        raise ConfigError(
            'hc_eps: numerics "paper" has none; leave it out or use numerics="deepseek_v4"'
        )
    if norm_eps is not None:
        require_epsilon("norm_eps:", norm_eps)
        chosen = replace(chosen, norm_eps=norm_eps)
    if hc_eps is not None:
        require_epsilon("hc_eps:", hc_eps)
        chosen = replace(chosen, hc_eps=hc_eps)
    return chosen


def require_epsilon(name: str, value: float) -> None:
    """Raise ConfigError unless the value is a number from 0 to the largest float32."""
    if not isinstance(value, float | int) or not 0 <= value <= LARGEST_FLOAT32:
        raise ConfigError(f"{name} must be finite in float32 and not negative but is {value!r}")

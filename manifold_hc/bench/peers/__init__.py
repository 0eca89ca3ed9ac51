"""Other implementations of mHC: a table of packages, and an adapter function for each."""

from dataclasses import dataclass
from functools import partial
from importlib import metadata

from manifold_hc.bench.peers import adapters
from manifold_hc.bench.peers.implementations import Implementation, Oracle, without_branch
from manifold_hc.bench.problem import Inputs, Problem, reference_step
from manifold_hc.bench.task import quiet

DEEPSEEK_V4: Oracle = partial(reference_step, numerics="deepseek_v4")


@dataclass(frozen=True)
class Peer:
    """One package, and the problems it can run."""

    package: str
    """Distribution name; the extras `bench` and `bench-gpu` pin its version."""
    adapter: adapters.Adapter
    oracle: Oracle = DEEPSEEK_V4
    """Its equations."""
    note: str = ""
    """How its equations differ from ours."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Dtypes of the streams."""
    streams: tuple[int, ...] = ()
    """Numbers of streams; empty for any."""
    compiles: bool = False
    """True if it is timed through torch.compile too."""

    @property
    def version(self) -> str | None:
        """Installed version; None where the package is missing."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def build(self, problem: Problem, inputs: Inputs) -> Implementation:
        """Build it with parameters from `inputs`. Raises ImportError where it is missing."""
        with quiet():
            connect, parameters = self.adapter(problem, inputs)
        return Implementation(without_branch(connect), parameters, self.oracle)


PEERS = (
    Peer("transformers", adapters.transformers, compiles=True),
    Peer(
        "hyper-connections",
        adapters.hyper_connections,
        oracle=adapters.separate_streams,
        note="other maths: each stream normalised and projected by itself, as in HC; "
        "res = Sinkhorn transposed",
        compiles=True,
    ),
    Peer(
        "liger-kernel",
        adapters.liger_kernel,
        oracle=adapters.untransposed,
        note="its res is the transpose of DeepSeek-V4's",
        devices=("cuda",),
        streams=(2, 4, 8, 16),
    ),
    Peer(
        "tile-kernels",
        adapters.tile_kernels,
        devices=("cuda",),
        dtypes=("bfloat16",),
        streams=(4,),
    ),
)
"""All peers; each is required where it runs."""


def for_problem(problem: Problem) -> list[Peer]:
    """Return the peers that run at this size, dtype and device."""
    return [
        peer
        for peer in PEERS
        if problem.device.partition(":")[0] in peer.devices
        and problem.dtype in peer.dtypes
        and (not peer.streams or problem.streams in peer.streams)
    ]


def install_hint(error: ImportError, device: str) -> str:
    """Return the import error with the command that installs the peers."""
    return f"{error}; pip install 'manifold-hc[{'bench' if device == 'cpu' else 'bench-gpu'}]'"

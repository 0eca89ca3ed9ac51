"""torchtitan's DeepSeek-V3 with residual, hyper- and manifold-constrained hyper-connections.

torchtitan plugs this package in by name:
`python -m torchtitan.train --module manifold_hc.interop.torchtitan --config deepseek_v3_mhc_debug`.
The configurations are the functions of `config_registry`. `with_connections` puts connections
into any other DeepSeek-V3 model of torchtitan.
"""

from manifold_hc.extras import require

require("manifold_hc.interop.torchtitan", "torchtitan")

from manifold_hc.interop.torchtitan.model import ConnectedBlock, ConnectedModel, Streams
from manifold_hc.interop.torchtitan.spec import with_connections
from manifold_hc.interop.torchtitan.trainer import ConnectedTrainer

__all__ = ["ConnectedBlock", "ConnectedModel", "ConnectedTrainer", "Streams", "with_connections"]

"""Retrofit: pretrained residual models get hyper-connections and start as the same function.

`register` and `load` need transformers, `save_adapter` and `load_adapter` safetensors; `convert`
needs torch alone.
"""

from manifold_hc.interop.retrofit.adapter import load_adapter, save_adapter
from manifold_hc.interop.retrofit.conversion import convert
from manifold_hc.interop.retrofit.families import FAMILIES, Family
from manifold_hc.interop.retrofit.loading import load, register
from manifold_hc.interop.retrofit.sublayers import Parallel, Sublayer

__all__ = [
    "FAMILIES",
    "MODULES_TO_SAVE",
    "Family",
    "Parallel",
    "Sublayer",
    "convert",
    "load",
    "load_adapter",
    "register",
    "save_adapter",
]

MODULES_TO_SAVE = ["maps", "exit"]
"""`modules_to_save` of PEFT: the parameters of the connections, and of a learned exit."""

# ruff: noqa: E402  # the extra is checked before the imports that need it
"""Our models as models of transformers: importing this package registers them.

`AutoModelForCausalLM.from_pretrained(folder)` then loads a folder that `export` or
`save_pretrained` has written, and `AutoTokenizer.from_pretrained(folder)` its tokenizer.
"""

from manifold_hc.extras import require

require("manifold_hc.interop.huggingface", "transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from manifold_hc.interop.huggingface.configuration import ManifoldConfig
from manifold_hc.interop.huggingface.exporting import export
from manifold_hc.interop.huggingface.generation import Continuation, Sampling, continue_texts
from manifold_hc.interop.huggingface.modeling import ManifoldForCausalLM
from manifold_hc.interop.huggingface.opening import open_model
from manifold_hc.interop.huggingface.tokenizers import as_transformers

AutoConfig.register(ManifoldConfig.model_type, ManifoldConfig, exist_ok=True)
AutoModelForCausalLM.register(ManifoldConfig, ManifoldForCausalLM, exist_ok=True)

__all__ = [
    "Continuation",
    "ManifoldConfig",
    "ManifoldForCausalLM",
    "Sampling",
    "as_transformers",
    "continue_texts",
    "export",
    "open_model",
]

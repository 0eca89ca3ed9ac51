"""Tiny, randomly initialised models of transformers, one of every family that retrofit knows."""

import torch

VOCABULARY = 64

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

OPTIONS = {
    "mixtral": MIXTURE,
    "qwen2_moe": MIXTURE,
    "qwen3_moe": MIXTURE,
    "olmoe": MIXTURE,
    "granite": {"residual_multiplier": 0.5},
    **{
        family: {"head_dim": 8}
        for family in ("gemma", "gemma2", "gemma3_text", "helium", "ministral")
    },
}


def tiny(family, seed=0, **options):
    """A model of this family in eval mode; norms and biases differ from their initial values too.

    A trailing `:sequential` switches off the parallel residual branches.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    name, _, form = family.partition(":")
    sizes = {**SIZES, **OPTIONS.get(name, {}), **options}
    if form:
        sizes["use_parallel_residual"] = form == "parallel"
    if name == "gpt2":
        del sizes["intermediate_size"], sizes["num_key_value_heads"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tokens(batch=2, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def logits(model, ids=None, **options):
    with torch.no_grad():
        return model(tokens() if ids is None else ids, **options).logits


def relative_error(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def scatter(model, std=0.1, only=""):
    """Change every parameter whose name contains `only`, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model

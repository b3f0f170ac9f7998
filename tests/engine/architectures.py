"""Small models of other architectures than GPT-2's, with random weights."""

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
    XLMConfig,
    XLNetConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
NO_GROUPS = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
ENDLESS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}

# Grouped heads, one head for all, norms on heads, windows, capped scores, parallel blocks, biases.
PACKED: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama with one head for all": LlamaConfig(
        **{**SIZES, "hidden_size": 70, "num_attention_heads": 7, "num_key_value_heads": 1},
        head_dim=64,
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=1
    ),
    "gpt-neox": GPTNeoXConfig(**{**NO_GROUPS, "hidden_size": 72}),
    "phi": PhiConfig(**SIZES),
}

MAMBA = MambaConfig(vocab_size=4096, hidden_size=64, num_hidden_layers=2, **ENDLESS)

# Recurrent states, experts that see some of the rows, rotations that depend on the longest
# sequence, attention that cannot be replaced, tokens predicted in their own place; and what is
# said of each.
ONE_BY_ONE: dict[str, tuple[Any, str]] = {
    "mamba": (MAMBA, "MambaMixer has weights of its own"),
    "mixtral": (
        MixtralConfig(**SIZES, num_local_experts=4),
        "MixtralTopKRouter has weights of its own",
    ),
    "phi3 with longrope": (
        Phi3Config(**SIZES, original_max_position_embeddings=200, rope_parameters=LONGROPE),
        "a token's numbers depend on the position of another",
    ),
    "gpt-j": (
        GPTJConfig(
            vocab_size=4096,
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=8,
            n_positions=256,
            **ENDLESS,
        ),
        "its forward raised TypeError",
    ),
    "xlnet": (
        XLNetConfig(vocab_size=4096, d_model=64, d_inner=96, n_layer=2, n_head=4, **ENDLESS),
        "XLNetModel has weights of its own",
    ),
    "xlm": (
        XLMConfig(vocab_size=4096, emb_dim=64, n_layers=2, n_heads=4, **ENDLESS),
        "not every layer's attention can be replaced",
    ),
}


def random_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            weight.data *= 4  # attention that prefers something, and greedy choices far apart
    return model.requires_grad_(False)

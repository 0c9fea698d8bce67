"""A Llama of a few thousand numbers, which transformers trains, and what it reads."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    config.attention_dropout = 0.1
    return LlamaForCausalLM(config).to(dtype)


def make_data():
    """Six batches of 8."""
    tokens = torch.randint(64, (48, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]

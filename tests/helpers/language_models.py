"""Tiny language models of transformers with random weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers")


def llama(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**(shape | heads | changes))
    return transformers.LlamaForCausalLM(config).eval()

"""What the examples share: a causal language model, blocks of tokens of a text file, and the layers
that they adapt.

With --toy the model is a random two-layer Llama over bytes, and the text is this file: nothing is
downloaded and each example ends within seconds.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

# Every linear layer of the blocks; "all-linear" in PEFT.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all examples have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="folder or hub name")
    options.add_argument("--text", type=Path, help="a text file to train on; needed without --toy")
    options.add_argument("--out", type=Path, default=Path("randlora-adapter"))
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--block", type=int, default=512, help="tokens of one example")
    options.add_argument("--lr", type=float, default=2.5e-4)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--toy", action="store_true", help="a tiny random model, thirty steps")
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    args = options.parse_args()
    if args.toy:
        args.steps, args.block, args.rank, args.lr, args.text = 30, 32, 8, 1e-2, Path(__file__)
    elif args.text is None:
        options.error("--text is needed: a file to train on (or --toy)")
    return args


def toy_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )


def load_model(args: argparse.Namespace):
    if args.toy:
        return toy_model()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model)


def load_blocks(args: argparse.Namespace) -> Tensor:
    """The text as (examples, block) token numbers; a rest that fills no block is left out."""
    text = args.text.read_text(encoding="utf-8")
    if args.toy:
        tokens = torch.tensor(list(text.encode()))
    else:
        from transformers import AutoTokenizer

        tokens = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text)["input_ids"])
    count = len(tokens) // args.block
    if count == 0:
        raise SystemExit(f"{args.text} has {len(tokens)} tokens, fewer than one block")
    return tokens[: count * args.block].view(count, args.block)


def difference(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||"""
    return float((got - want).norm() / want.norm())

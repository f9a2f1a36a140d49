"""Adapters and model folders for the tests of the command line."""

import contextlib
import io

import torch
from peft_helpers import adapted
from peft_helpers import edit as edit
from safetensors.torch import load_file, save_file

from randlora_cli import main

Q0 = "model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS = {
    "generated": {"basis": "independent", "density": 0.07, "projection_prng_key": 7},
    "generated third": {"basis": "independent"},
    "hadamard": {"basis": "hadamard", "projection_prng_key": 7},
    "sparse": {"sparse": True, "save_projection": False},
    "sparse saved": {"sparse": True},
    "very_sparse": {"very_sparse": True, "save_projection": False},
    "uniform": {"save_projection": False},
}


def run(*arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``randlora arguments``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def refused(*arguments) -> str:
    """The one-line message of a command that fails with exit code 2."""
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if "steps" not in line and "step/s" not in line]
    assert code == 2 and out == "", (code, out, err)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "unexpected" not in errors[0] and "Traceback" not in err, err
    return errors[0]


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(shape | heads | changes))).eval()


def gpt2(folder, **options):
    """Saves a model of Conv1D layers; returns it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    base = GPT2LMHeadModel(GPT2Config(**shape, **options)).eval()
    base.save_pretrained(folder)
    return base


def save_adapter(base, folder, targets=TARGETS, **options):
    """Saves an adapter of `base`, which is not zero, in `folder`; returns the PeftModel."""
    model = adapted(base, targets, **options).eval()
    model.save_pretrained(folder)
    return model


def sharded(folder, dtype=torch.float32, size="20KB", **changes):
    """Saves a model in several files; returns it."""
    base = llama(**changes).to(dtype)
    base.save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer.json").write_text("{}")
    return base


def added(prefix="base_model.model.", **changes):
    """A function that puts tensors into root/adapter, by their names in the base model."""

    def add(root):
        file = root / "adapter" / "adapter_model.safetensors"
        save_file(load_file(file) | {prefix + name: t for name, t in changes.items()}, file)

    return add

"""Models to save adapters of, and what is in the folder of a saved one."""

import json

import torch
from layer_helpers import randomize
from safetensors.torch import load_file
from torch import nn

from randlora_ext import apply_randlora
from randlora_ext.nn.adapter_record import RECORD_KEY

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIONS = {"r": 5, "randlora_alpha": 9, "density": 0.3, "seed": 2**63 + 5, "basis": "independent"}


class Model(nn.Module):
    """Wide, tall, square; one layer under two names."""

    def __init__(self, hidden=24):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.block = nn.ModuleDict({"up": nn.Linear(16, 16), "norm": nn.LayerNorm(16)})
        self.block["spare"] = nn.Linear(4, 4)
        self.tied = self.block["up"]

    def forward(self, x):
        return self.block["norm"](self.tied(self.down(self.up(x)) + self.block["up"](x)))


def adapted(numbers=1, **options):
    return randomize(
        apply_randlora(Model(), ["up", "down", "tied"], **(OPTIONS | options)), numbers
    )


def with_head(**options):
    model = nn.Sequential(Model(), torch.compile(nn.Linear(16, 3)))
    return apply_randlora(model, ["up"], modules_to_save=["norm", "1"], r=2, **options)


def two_squares():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def tensors_in(folder):
    return load_file(folder / WEIGHTS)


def config_in(folder):
    return json.loads((folder / CONFIG).read_text())


def edit_config(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(config_in(folder) | fields))


def names_in(folder):
    """The names of all tensors but records, without PEFT's prefix."""
    names = {name.removeprefix("base_model.model.") for name in tensors_in(folder)}
    return {name for name in names if not name.endswith(RECORD_KEY)}

"""λ and γ of `RandLoraLinear` layers in one safetensors file, for those without PEFT.

Such a file holds what ``named_parameters()`` of the model calls ``...randlora_lambda.NAME`` and
``...randlora_gamma.NAME``, and, as its metadata "randlora", the JSON of the options that say which
bases they belong to: r, randlora_alpha, density, projection_prng_key. Written by
``save_file(tensors, file, metadata={"randlora": json.dumps(options)})``.
"""

import json
import re
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..peft import RandLoraConfig, enable
from .errors import CliError, first_line

PREFIX = "base_model.model."  # of PEFT's keys
_OPTIONS = {"r", "randlora_alpha", "density", "projection_prng_key"}
_KEY = re.compile(r"(?P<path>.+)\.randlora_(?P<which>lambda|gamma)\.(?P<adapter>[^.]+)")


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. CliError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CliError(f"{file} is damaged or no safetensors file: {first_line(error)}") from error


def read_plain_file(file: Path) -> tuple[RandLoraConfig, dict[str, Tensor]]:
    """(config, tensors by the keys that PEFT would give them)."""
    tensors, metadata = read_tensors(file)
    renamed, adapters = {}, set()
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            renamed[f"{PREFIX}{match['path']}.randlora_{match['which']}"] = tensor
            adapters.add(match["adapter"])
        elif ".randlora_" in key:
            raise CliError(f"{file}: {key} is no lambda or gamma of RandLoraLinear")
    if len(adapters) != 1:
        raise CliError(f"{file} must hold lambda and gamma of one adapter, got {sorted(adapters)}")
    layers = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in renamed})
    return _config(file, metadata, layers), renamed


def _config(file: Path, metadata: dict[str, str], layers: list[str]) -> RandLoraConfig:
    try:
        options = json.loads(metadata["randlora"])
    except (KeyError, ValueError) as error:
        raise CliError(
            f'{file} does not tell its bases: its metadata must have "randlora", the JSON of '
            f"{', '.join(sorted(_OPTIONS))}"
        ) from error
    if not isinstance(options, dict) or set(options) != _OPTIONS:
        raise CliError(f"{file}: metadata randlora must be {sorted(_OPTIONS)}, got {options}")
    enable()  # without it the config refuses our fields
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save")
            return RandLoraConfig(target_modules=layers, basis="independent", **options)
    except (TypeError, ValueError) as error:
        raise CliError(f"{file}: {first_line(error)}") from error

"""A saved adapter, a folder of PEFT's format or a file of λ and γ, read without its model."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..peft import RandLoraConfig, enable
from .errors import CliError, first_line
from .plain_file import PREFIX, read_plain_file, read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAMBDA, GAMMA = ".randlora_lambda", ".randlora_gamma"


@dataclass(frozen=True)
class Adapter:
    """What was saved.

    Attributes:
        source: the folder, or the file where there is no folder.
        file: the safetensors file.
        settings: adapter_config.json as it stands; empty where there is none.
        config: what says which bases, and the rest of the settings.
        layers: (lambda (r, n), gamma (n, d)) by the path of the layer in the base model.
        bases: "randlora_A" (r, 1, d) and "randlora_B" (D, n, r) of the largest layers, where saved.
        others: tensors of modules_to_save and biases, by their path in the base model.
        tensors: all but bases, by PEFT's keys.
    """

    source: Path
    file: Path
    settings: dict
    config: RandLoraConfig
    layers: dict[str, tuple[Tensor, Tensor]]
    bases: dict[str, Tensor]
    others: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @property
    def file_bytes(self) -> int:
        return self.file.stat().st_size


def read_adapter(source: Path) -> Adapter:
    """Reads a folder of ``save_pretrained``, or a file that `plain_file` describes.

    CliError where it is no RandLoRA adapter.
    """
    if source.is_file():
        return _sorted(source, source, {}, *read_plain_file(source))
    return _read_folder(source)


def _read_folder(folder: Path) -> Adapter:
    settings = read_json(folder / CONFIG, "an adapter has one; see PEFT's save_pretrained")
    kind = settings.get("peft_type")
    if kind != "RANDLORA":
        raise CliError(f"{folder / CONFIG}: peft_type must be RANDLORA, got {kind!r}")
    config = _config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        raise CliError(
            f"{file} does not exist; only safetensors are read, never a pickle such as "
            "adapter_model.bin: open that in PEFT and save it again"
        )
    return _sorted(folder, file, settings, config, read_tensors(file)[0])


def read_json(path: Path, needed: str) -> dict:
    """A JSON object of a file."""
    if not path.is_file():
        raise CliError(f"{path} does not exist; {needed}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CliError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise CliError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _config(folder: Path) -> RandLoraConfig:
    enable()  # so that PEFT reads our fields
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save")
            config = RandLoraConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises whatever its fields' conversions raise
        raise CliError(f"{folder / CONFIG}: {first_line(error)}") from error
    return config


def _sorted(
    source: Path, file: Path, settings: dict, config: RandLoraConfig, tensors: dict[str, Tensor]
) -> Adapter:
    _check_numbers(source, config)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    bases: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in ("base_model.randlora_A", "base_model.randlora_B"):
            bases[key.removeprefix("base_model.")] = tensor
        elif not key.startswith(PREFIX):
            raise CliError(f"{file}: tensor {key!r} must start with {PREFIX!r}")
        elif key.endswith(LAMBDA):
            path = key.removesuffix(LAMBDA)
            gamma = tensors.get(path + GAMMA)
            _check_diagonals(file, path, tensor, gamma, config.r)
            assert gamma is not None
            layers[path.removeprefix(PREFIX)] = (tensor, gamma)
        elif key.endswith(GAMMA):
            if key.removesuffix(GAMMA) + LAMBDA not in tensors:
                raise CliError(f"{file}: {key} has no lambda beside it")
        elif key.endswith((".randlora_A", ".randlora_B")):
            copies.setdefault(key.rpartition(".")[2], tensor)
        else:
            others[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
    if not layers:
        raise CliError(f"{file} holds no randlora_lambda: it is no RandLoRA adapter")
    bases = bases or copies  # stock PEFT writes copies under layers, transformers nothing else
    if len(bases) == 1:
        raise CliError(f"{file} holds {next(iter(bases))} alone; both bases belong together")
    if bases:
        _check_bases(file, **bases, r=config.r, sizes=[gam.shape for _, gam in layers.values()])
    kept = {k: v for k, v in tensors.items() if not k.endswith((".randlora_A", ".randlora_B"))}
    return Adapter(source, file, settings, config, layers, bases, others, kept)


def _check_numbers(source: Path, config: RandLoraConfig) -> None:
    r, alpha = config.r, config.randlora_alpha
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise CliError(f"{source}: r must be a positive integer, got {r!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CliError(f"{source}: randlora_alpha must be a number, got {alpha!r}")


def _check_diagonals(file: Path, path: str, lam: Tensor, gam: Tensor | None, r: int) -> None:
    if gam is None:
        raise CliError(f"{file}: {path}{LAMBDA} has no gamma beside it")
    for name, tensor in ((LAMBDA, lam), (GAMMA, gam)):
        if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.numel() == 0:
            raise CliError(
                f"{file}: {path}{name} must be a floating point matrix, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    (n, d) = gam.shape
    if tuple(lam.shape) != (r, n) or n != -(-d // r):
        raise CliError(
            f"{file}: {path} has lambda {tuple(lam.shape)} and gamma {tuple(gam.shape)}; with r = "
            f"{r} they must be (r, n) and (n, d) with n = ceil(d / r) = {-(-d // r)}"
        )


def _check_bases(file: Path, randlora_A: Tensor, randlora_B: Tensor, r: int, sizes: list) -> None:
    n, d = (max(size[k] for size in sizes) for k in (0, 1))
    a, b = tuple(randlora_A.shape), tuple(randlora_B.shape)
    # Every layer takes its slice from the front.
    sound = len(a) == len(b) == 3 and a[1] == 1 and a[0] >= r and a[2] >= d
    sound = sound and b[0] >= d and b[1] >= n and b[2] >= r
    if not sound or not (randlora_A.is_floating_point() and randlora_B.is_floating_point()):
        raise CliError(
            f"{file}: randlora_A {randlora_A.dtype} {a} or randlora_B {randlora_B.dtype} {b} is "
            f"too small; they must be floating point of at least ({r}, 1, {d}) and ({d}, {n}, {r})"
        )

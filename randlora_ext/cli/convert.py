"""``randlora convert``: an adapter with its bases, with lambda and gamma alone, or as LoRA.

The bases of an adapter cannot be exchanged for others: lambda and gamma were trained for them. What
can change is whether the file holds them (PEFT's format, which any PEFT opens) or says how to make
them again (small). LoRA keeps the part of dW that its rank can hold.
"""

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..peft import RandLoraConfig, enable
from ..peft.adapter_basis import AdapterBasis
from ..peft.card import write_card
from ..peft.lora import shared_fields, write_lora, write_lora_card
from ..peft.saving import stock_config
from ..writing import appear_new
from .adapter import BASES, CONFIG, GAMMA, LAMBDA, PREFIX, WEIGHTS, Adapter, read_adapter
from .files import CliError, check_free
from .layers import Shape, dense_bases, layer_changes, module_paths, shapes_of

# Fields that say which bases an adapter has, or whether they are saved.
_OF_BASES = {"density", "basis", "sparse", "very_sparse", "save_projection", "projection_prng_key"}


def convert(
    source: Path,
    out: Path,
    to: str,
    base: str | None = None,
    density: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> int:
    """Writes the folder `out`. Except with LoRA, the new adapter computes the same.

    Args:
        to: "peft": bases included, once, and PEFT's own fields alone, so that stock PEFT opens it,
            as by `export_to_peft`. If they are not saved, the base model's shapes are needed.
            Hadamard bases must belong to layers of one min(in, out).
            "compact": without bases. They are drawn or generated again from the adapter's key, and
            compared bit for bit with the saved ones; if they differ, CliError. If a 16-bit model
            has rounded the value of ternary ones, lambda takes up the factor.
            "lora": the nearest LoRA adapter, as by `export_to_lora`. A PEFT folder needs the base
            model's shapes.
        base: the base model, a folder or a name in the hub's cache.
        density: of the saved bases, if it cannot be inferred from them.
        rank, energy: with "lora", one of them.
    """
    check_free(out)
    if to == "lora" and (rank is None) == (energy is None):
        raise CliError("--to lora needs either --rank or --energy")
    if to != "lora" and (rank, energy) != (None, None):
        raise CliError("--rank and --energy go with --to lora")
    adapter = read_adapter(source)
    if to == "lora":
        return _to_lora(adapter, out, base, rank, energy)
    shapes = shapes_of(adapter, base) if adapter.plain else None
    adapter = _in_terms_of_peft(adapter) if adapter.plain else adapter
    bases: Mapping[str, Tensor] = {}
    factor = 1.0
    if to == "peft":
        bases = adapter.bases
        if not bases:
            bases = dense_bases(adapter, shapes or shapes_of(adapter, base))
        config = stock_config(adapter.config, _is_ternary(bases["randlora_A"]))
        told = "stock PEFT opens it"
    elif shapes:
        config, told = adapter.config, "a folder that randlora_ext.peft opens"
    else:
        config, told, factor = _without_bases(adapter, density)
    tensors = {
        key: (tensor.double() * factor).to(tensor.dtype) if key.endswith(LAMBDA) else tensor
        for key, tensor in adapter.tensors.items()
    }
    tensors |= {f"base_model.{name}": basis.contiguous() for name, basis in bases.items()}
    with appear_new(out) as folder:
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        fields = json.loads((folder / CONFIG).read_text())
        # Fields that this version of PEFT does not know stay.
        kept = {k: v for k, v in adapter.settings.items() if k not in _OF_BASES | fields.keys()}
        (folder / CONFIG).write_text(json.dumps(fields | kept, indent=2, sort_keys=True) + "\n")
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", folder / "README.md")
            write_card(folder, out.name)
        size = (folder / WEIGHTS).stat().st_size
    print(f"{out}: {size:,} bytes, was {adapter.file_bytes:,}; {told}")
    return 0


def _to_lora(
    adapter: Adapter, out: Path, base: str | None, rank: int | None, energy: float | None
) -> int:
    changes = layer_changes(adapter, shapes_of(adapter, base))
    if adapter.plain:
        fields = {"fan_in_fan_out": any(s.fan_in_fan_out for s in adapter.plain.values())}
    else:
        fields = shared_fields(adapter.config)
    mine = {*adapter.ignored, *(key for key in adapter.tensors if key.endswith((LAMBDA, GAMMA)))}
    others = {key: tensor for key, tensor in adapter.tensors.items() if key not in mine}
    with appear_new(out) as folder:
        folder.mkdir()
        deltas = {path: change.delta for path, change in changes.items()}
        try:
            done = write_lora(
                folder, deltas, fields, module_paths(adapter, base), rank, energy, others
            )
        except ValueError as error:
            raise CliError(f"{adapter.source}: {error}") from error
        write_lora_card(folder, out.name, done)
        size = (folder / WEIGHTS).stat().st_size
    width = max(map(len, done.layers))
    print("\n".join(f"{path:{width}}  {kept:.4f}" for path, kept in done.layers.items()))
    print(f"{out}: rank {done.rank} keeps {done.energy:.4f} of |dW|^2; {size:,} bytes")
    if fields.get("modules_to_save"):
        print("vLLM refuses it, since it replaces modules (modules_to_save); merge for vLLM")
    return 0


def _in_terms_of_peft(adapter: Adapter) -> Adapter:
    """A file of `save_adapter`, as if it were read from a PEFT folder."""
    assert adapter.plain is not None
    options = {
        (s.basis.r, s.scaling, s.randlora_dropout, s.fan_in_fan_out, s.description)
        for s in adapter.plain.values()
    }
    if len(options) > 1:
        raise CliError(
            f"{adapter.file} has layers of different options; an adapter of PEFT has one r, "
            "scaling, dropout and basis"
        )
    ((r, scaling, dropout, fan_in_fan_out, basis),) = options
    enable()  # without it the config refuses our fields
    config = RandLoraConfig(
        r=r,
        randlora_alpha=scaling * r,
        randlora_dropout=dropout,
        fan_in_fan_out=fan_in_fan_out,
        target_modules=sorted(adapter.plain),
        basis=basis.kind,
        density=basis.density,
        projection_prng_key=basis.seed,
    )
    tensors: dict[str, Tensor] = {}
    for path, (lam, gam) in adapter.diagonals.items():
        tensors |= {f"{PREFIX}{path}{LAMBDA}": lam, f"{PREFIX}{path}{GAMMA}": gam}
    return dataclasses.replace(adapter, plain=None, config=config, tensors=tensors)


def _without_bases(adapter: Adapter, density: float | None) -> tuple[RandLoraConfig, str, float]:
    """The configuration, what makes the bases, and the factor of `_factor`."""
    if not adapter.bases:
        raise CliError(f"{adapter.source} holds no bases: it is compact already")
    if density is None and (config := _config(adapter)) and (factor := _factor(config, adapter)):
        stock = AdapterBasis.of(vars(config)).known_to_stock
        readers = "stock PEFT and randlora_ext" if stock else "randlora_ext"
        return config, f"{readers} draws its bases again from the key", factor
    for guess in [density] if density is not None else _densities(adapter):
        for basis in ("hadamard", "independent", "peft"):
            share = None if basis == "hadamard" else guess
            config = _config(adapter, basis=basis, density=share, sparse=False, very_sparse=False)
            if config is not None and (factor := _factor(config, adapter)):
                makes = "draws" if basis == "peft" else "generates"
                which = basis if basis == "hadamard" else f"density {guess:.6g}"
                return config, f"randlora_ext {makes} its bases again ({which})", factor
    tried = "as PEFT draws them or as generated" if density is None else f"at density {density}"
    raise CliError(
        f"{adapter.source}: the saved bases are not those of projection_prng_key "
        f"{adapter.config.projection_prng_key} {tried}, so they must stay"
    )


def _config(adapter: Adapter, **fields: Any) -> RandLoraConfig | None:
    """The config without saved bases and with `fields` replaced; None if that is invalid."""
    if fields:  # a text would contradict them
        fields["projection_prng_key"] = AdapterBasis.of(vars(adapter.config)).seed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        try:
            return dataclasses.replace(adapter.config, save_projection=False, **fields)
        except (ValueError, TypeError):
            return None


def _factor(config: RandLoraConfig, adapter: Adapter) -> float:
    """What the product of the bases that `config` makes must be multiplied by to be the saved one.

    It is 1, or near that if the saved ones were rounded as by a 16-bit base model. 0 if the bases
    are others.
    """
    width, D = adapter.bases["randlora_A"].shape[-1], adapter.bases["randlora_B"].shape[0]
    d = width
    if config.basis == "hadamard":
        sizes = {gam.shape[1] for _, gam in adapter.diagonals.values()}
        d = max(sizes)
        if len(sizes) > 1:
            return 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shapes = {"wide": Shape(d, D, dtype)}
        if d < width:  # written for transposed layers, too
            shapes["tall"] = Shape(D, d, dtype)
        made = dense_bases(dataclasses.replace(adapter, config=config), shapes)
        pairs = [(adapter.bases[name].float(), made[name]) for name in BASES]
        if all(torch.equal(saved, own.to(dtype).float()) for saved, own in pairs):
            largest = [(float(saved.abs().max()), float(own.abs().max())) for saved, own in pairs]
            return math.prod(saved / own if own else 1.0 for saved, own in largest)
    return 0.0


def _densities(adapter: Adapter) -> list[float]:
    """Densities that explain the value of +1 in B, which has more elements than A. The value is
    1 / sqrt(density) or, in PEFT's draw, 1 / the sample's standard deviation, which is near that.
    """
    A, B = (adapter.bases[name].float() for name in BASES)
    if not _is_ternary(B) or not bool(B.any()):
        return []
    exact = 1 / float(B.abs().max()) ** 2
    guesses = [A.shape[-1] ** -0.5]
    guesses += [float(Fraction(exact).limit_denominator(k)) for k in (16, 100, 1000)]
    guesses += [float(f"{exact:.{digits}g}") for digits in (1, 2, 3, 4, 5)]
    return [guess for guess in dict.fromkeys(guesses) if guess <= 1 and 0.95 < guess / exact < 1.05]


def _is_ternary(basis: Tensor) -> bool:
    return bool(((basis == 0) | (basis.abs() == basis.abs().max())).all())

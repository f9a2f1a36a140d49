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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..peft import RandLoraConfig, enable
from ..peft.adapter_basis import AdapterBasis, largest, make_bases
from ..peft.lora import shared_fields, write_lora
from ..peft.saving import dense_bases, stock_config, write_card
from ..writing import appear_new
from . import CliError, check_free, told_of
from .adapter import (
    BASES,
    CONFIG,
    GAMMA,
    LAMBDA,
    PREFIX,
    WEIGHTS,
    Adapter,
    Shape,
    changes_of,
    read_adapter,
    shapes_in,
)
from .checkpoint import Checkpoint, find_base, locate, read_json

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
        to: "peft": with bases and PEFT's own fields alone, as by `export_to_peft`. "compact":
            without bases, if making them again gives the saved ones bit for bit; if a 16-bit model
            has rounded the value of ternary ones, lambda takes up the factor. "lora": as by
            `export_to_lora`.
        base: the base model, a folder or a name in the hub's cache, if its shapes are needed.
        density: of the saved bases, if the adapter's configuration does not say it.
        rank, energy: with "lora", one of them.
    """
    check_free(out)
    if to == "lora" and (rank is None) == (energy is None):
        raise CliError("--to lora needs either --rank or --energy")
    if to != "lora" and (rank, energy) != (None, None):
        raise CliError("--rank and --energy go with --to lora")
    if to != "compact" and density is not None:
        raise CliError("--density goes with --to compact")
    adapter = read_adapter(source)
    for path, layer in (adapter.plain or {}).items():
        if layer.also_at:
            raise CliError(
                f"{source}: {path} is also {', '.join(layer.also_at)}, and PEFT would adapt one of "
                "these paths; untie the layers, or merge"
            )
    if to == "lora":
        return _to_lora(adapter, out, base, rank, energy)
    if to == "compact" and not (adapter.bases or adapter.plain):
        raise CliError(f"{source} holds no bases: it is compact already")
    bases, factor = adapter.bases, 1.0
    if to == "peft":
        if bases is None:
            shapes = _shapes(adapter, base)[0].items()
            sizes = {path: (shape.in_features, shape.out_features) for path, shape in shapes}
            adapter = _in_terms_of_peft(adapter)
            with told_of(source, ValueError):
                made = make_bases(adapter.config, *largest(sizes.values()))
                bases = dense_bases(*made, sizes)
        config, told = stock_config(adapter.config, _is_ternary(bases[0])), "stock PEFT"
    elif bases:
        config, factor = _without_bases(adapter, bases, density)
        stock = AdapterBasis.of(vars(config)).known_to_stock
        told, bases = f"{'stock PEFT and ' * stock}randlora_ext.peft", None
    else:
        adapter = _in_terms_of_peft(adapter)
        config, told = adapter.config, "randlora_ext.peft"
    tensors = {
        key: (tensor.double() * factor).to(tensor.dtype) if key.endswith(LAMBDA) else tensor
        for key, tensor in adapter.tensors.items()
    }
    if bases:
        named = zip(BASES, bases, strict=True)
        tensors |= {f"base_model.{name}": basis.contiguous() for name, basis in named}
    with appear_new(out) as folder:
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        fields = json.loads((folder / CONFIG).read_text())
        # Fields that this version of PEFT does not know stay.
        was = read_json(source / CONFIG) if source.is_dir() else {}
        kept = {k: v for k, v in was.items() if k not in _OF_BASES | fields.keys()}
        (folder / CONFIG).write_text(json.dumps(fields | kept, indent=2, sort_keys=True) + "\n")
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", folder / "README.md")
            write_card(folder, out.name)
        files = folder / WEIGHTS, source if source.is_file() else source / WEIGHTS
        size, old = (file.stat().st_size for file in files)
    print(f"{out}: {size:,} bytes, was {old:,}; {told} opens it")
    return 0


def _shapes(adapter: Adapter, base: str | None) -> tuple[dict[str, Shape], Checkpoint | None]:
    """The layers' shapes, and the base model if only that knows them, or `base` is given."""
    if adapter.plain and base is None:
        return {path: Shape(*layer.features) for path, layer in adapter.plain.items()}, None
    checkpoint = find_base(base or (adapter.config and adapter.config.base_model_name_or_path))
    return shapes_in(adapter, checkpoint), checkpoint


def _to_lora(
    adapter: Adapter, out: Path, base: str | None, rank: int | None, energy: float | None
) -> int:
    shapes, checkpoint = _shapes(adapter, base)
    modules = set(shapes)
    if checkpoint is not None:
        parts = [name.split(".")[:-1] for name in checkpoint.tensors]
        there = {".".join(part[:k]) for part in parts for k in range(1, len(part) + 1)}
        name_in = locate(shapes, checkpoint)  # adapted ones are named as the adapter does
        modules |= there - set(map(name_in, shapes))
    if adapter.plain:
        fields = {"fan_in_fan_out": any(adapter.is_transposed(path) for path in shapes)}
    else:
        fields = shared_fields(adapter.config)
    deltas = {path: change.delta for path, change in changes_of(adapter, shapes).items()}
    others = {key: adapter.tensors[key] for key in adapter.others}
    with appear_new(out) as folder:
        folder.mkdir()
        with told_of(adapter.source, ValueError):
            done = write_lora(folder, deltas, fields, modules, rank, energy, others)
        write_card(folder, out.name, note=done.note)
        size = (folder / WEIGHTS).stat().st_size
    width = max(map(len, done.layers))
    print("\n".join(f"{path:{width}}  {kept:.4f}" for path, kept in done.layers.items()))
    print(f"{out}: rank {done.rank} keeps {done.energy:.4f} of |dW|^2; {size:,} bytes")
    if fields.get("modules_to_save"):
        print("vLLM refuses it, since it replaces modules (modules_to_save); merge for vLLM")
    return 0


def _in_terms_of_peft(adapter: Adapter) -> Adapter:
    """A file of `save_adapter`, as if it were read from a PEFT folder; such a one as it is."""
    if adapter.plain is None:
        return adapter
    options = {
        (s.r, s.scaling, s.randlora_dropout, s.fan_in_fan_out, s.description)
        for s in adapter.plain.values()
    }
    if len(options) > 1:
        raise CliError(
            f"{adapter.source} has layers of different options; an adapter of PEFT has one r, "
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
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for path, (lam, gam) in adapter.diagonals.items():
        tensors |= {f"{PREFIX}{path}{LAMBDA}": lam, f"{PREFIX}{path}{GAMMA}": gam}
    return dataclasses.replace(adapter, plain=None, config=config, tensors=tensors)


def _without_bases(
    adapter: Adapter, saved: tuple[Tensor, Tensor], share: float | None
) -> tuple[Any, float]:
    """The configuration that makes the bases again, and what lambda must be multiplied by.

    The factor is 1, or near that if the saved bases were rounded as by a 16-bit base model.
    """
    layers = {at: (gam.shape[1], gam.shape[1]) for at, (_, gam) in adapter.diagonals.items()}
    for config in _candidates(adapter.config, share):
        try:
            made = dense_bases(*make_bases(config, len(saved[1]), saved[0].shape[2]), layers)
        except ValueError:  # these bases do not exist for these layers
            continue
        pairs = [(was.float(), own) for was, own in zip(saved, made, strict=True)]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if all(torch.equal(was, own.to(dtype).float()) for was, own in pairs):
                largest = [(float(was.abs().max()), float(own.abs().max())) for was, own in pairs]
                return config, math.prod(was / own if own else 1.0 for was, own in largest)
    tried = "as its configuration says" if share is None else f"at density {share}"
    raise CliError(
        f"{adapter.source}: the saved bases are not those of projection_prng_key "
        f"{adapter.config.projection_prng_key} {tried}, so they must stay; --density gives that of "
        "bases that --to peft has written"
    )


def _candidates(config: Any, share: float | None) -> Iterator[Any]:
    """Configurations without saved bases that may make the saved ones."""
    seed = AdapterBasis.of(vars(config)).seed
    plain = {"sparse": False, "very_sparse": False, "projection_prng_key": seed}
    changes: list[dict[str, Any]] = [{}]
    if share is not None:
        changes = [plain | {"basis": kind, "density": share} for kind in ("independent", "peft")]
    elif 0 <= seed < 2**64:  # stock PEFT takes negative ones, too
        changes += [plain | {"basis": "hadamard", "density": None}, {"basis": "independent"}]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        for change in changes:
            with told_of("--density", (ValueError, TypeError)):
                yield dataclasses.replace(config, save_projection=False, **change)


def _is_ternary(basis: Tensor) -> bool:
    return bool(((basis == 0) | (basis.abs() == basis.abs().max())).all())

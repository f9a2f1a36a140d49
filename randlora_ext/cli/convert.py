"""``--convert ADAPTER OUT``: an adapter with its bases written out, or with lambda and gamma alone.

The bases of an adapter cannot be exchanged for others: lambda and gamma were trained for them. What
can change is whether the file holds them (PEFT's format, which any PEFT opens) or says how to make
them again (small).
"""

import dataclasses
import json
import shutil
import warnings
from fractions import Fraction
from itertools import product
from pathlib import Path

import torch
from peft.tuners.randlora.layer import RandLoraLayer
from safetensors.torch import save_file
from torch import Tensor

from ..peft import RandLoraConfig
from ..peft.export import dense_basis, stock_config
from ..peft.ternary_tensor import TernaryTensor
from .adapter import CONFIG, WEIGHTS, Adapter, read_adapter
from .checkpoint import find_base, read_checkpoint
from .errors import CliError
from .outputs import check_free, new_folder
from .skeleton import Shape, shapes_of, skeleton

_BASES = ("randlora_A", "randlora_B")
# Bases of a density of ours, and the fields that say so.
_WAYS: dict[str, dict] = {
    "generates its": {"basis": "independent"},
    "draws its": {"basis": "peft"},
}


def convert(
    source: Path, out: Path, to: str, base: str | None = None, density: float | None = None
) -> int:
    """Writes the folder `out`; the adapter computes the same.

    Args:
        to: "peft": bases included, once, and PEFT's own fields alone, so that stock PEFT opens it,
            as by `export_to_peft`. Where they are not saved, the base model's shapes are needed.
            "compact": without bases. They are drawn or generated again from the adapter's key, and
            compared bit for bit with the saved ones; where they differ, CliError.
        base: the base model, a folder or a name in the hub's cache.
        density: of bases that were written out, where it cannot be read off them.
    """
    check_free(out)
    adapter = read_adapter(source)
    if to == "peft":
        config, bases, told = _with_bases(adapter, base)
    else:
        config, told = _without_bases(adapter, density)
        bases = {}
    with new_folder(out) as folder:
        written = {f"base_model.{name}": basis.contiguous() for name, basis in bases.items()}
        state = adapter.tensors | written
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        _keep_written_fields(adapter, folder)
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", folder / "README.md")
        size = (folder / WEIGHTS).stat().st_size
    print(f"{out}: {size:,} bytes, was {adapter.file_bytes:,}; {told}")
    return 0


def _with_bases(
    adapter: Adapter, base: str | None
) -> tuple[RandLoraConfig, dict[str, Tensor], str]:
    if adapter.bases:
        bases = adapter.bases
    else:
        found = find_base(base or adapter.config.base_model_name_or_path)
        shapes = shapes_of(adapter, read_checkpoint(found))
        bases = _bases_of(skeleton(adapter, shapes))
    packed = _is_ternary(bases["randlora_A"])
    return stock_config(adapter.config, packed), bases, "stock PEFT opens it"


def _without_bases(adapter: Adapter, density: float | None) -> tuple[RandLoraConfig, str]:
    if adapter.source == adapter.file:
        return adapter.config, "a folder that randlora_ext.peft opens"
    if not adapter.bases:
        raise CliError(f"{adapter.source} holds no bases: it is compact already")
    if density is None and (config := _as_config(adapter)) and _same(adapter, config):
        readers = "randlora_ext" if config.density is not None else "stock PEFT and randlora_ext"
        return config, f"{readers} draws its bases again from the key"
    guesses = [density] if density is not None else _densities(adapter)
    for guess, (makes, fields) in product(guesses, _WAYS.items()):
        config = _as_config(adapter, density=guess, **fields)
        if config is not None and _same(adapter, config):
            return config, f"randlora_ext {makes} bases again (density {guess:.6g})"
    tried = "as PEFT draws them or as generated" if density is None else f"at density {density}"
    raise CliError(
        f"{adapter.source}: the saved bases are not those of projection_prng_key "
        f"{adapter.config.projection_prng_key} {tried}, so they must stay"
    )


def _as_config(adapter: Adapter, **fields) -> RandLoraConfig | None:
    """The config without projections; None where its values contradict each other."""
    if fields:
        fields |= {"sparse": False, "very_sparse": False}
    fields["save_projection"] = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        try:
            return dataclasses.replace(adapter.config, **fields)
        except (ValueError, TypeError):
            return None


def _same(adapter: Adapter, config: RandLoraConfig) -> bool:
    """Whether `config` makes the saved bases, perhaps as a base model of 16 bits rounds them."""
    A, B = adapter.bases["randlora_A"], adapter.bases["randlora_B"]
    (D, _, _), d = B.shape, A.shape[-1]
    # One layer of the largest sizes has the bases of all.
    path, (n, r) = "layer", (-(-d // config.r), config.r)
    diagonals = torch.zeros(r, n), torch.zeros(n, d)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        one = dataclasses.replace(adapter, config=config, layers={path: diagonals}, bases={})
        made = _bases_of(skeleton(one, {path: Shape(D, d, dtype)}))
        if torch.equal(made["randlora_A"], A.float()) and torch.equal(
            made["randlora_B"], B.float()
        ):
            return True
    return False


def _densities(adapter: Adapter) -> list[float]:
    """What the value of +1 may come from: 1 / sqrt(density), or for PEFT's draw 1 / the sample's
    own standard deviation, which is near that. Of B, which has more elements.
    """
    A, B = (adapter.bases[name].float() for name in _BASES)
    if not _is_ternary(B) or not bool(B.any()):
        return []
    exact = 1 / float(B.abs().max()) ** 2
    d = A.shape[-1]
    guesses = [d**-0.5, *(float(Fraction(exact).limit_denominator(k)) for k in (16, 100, 1000))]
    guesses += [float(f"{exact:.{digits}g}") for digits in (1, 2, 3, 4, 5)]
    close = [guess for guess in dict.fromkeys(guesses) if 0.95 < guess / exact < 1.05]
    return [guess for guess in close if guess <= 1]


def _bases_of(model) -> dict[str, Tensor]:
    """Dense float32 bases of a skeleton."""
    holder = next(m for m in model.modules() if isinstance(m, RandLoraLayer))
    return {name: dense_basis(getattr(holder, name)["default"]).float() for name in _BASES}


def _is_ternary(basis: Tensor) -> bool:
    try:
        TernaryTensor.of(basis)
    except ValueError:
        return False
    return True


def _keep_written_fields(adapter: Adapter, folder: Path) -> None:
    """The written config keeps what this version of PEFT does not know, but for our own fields."""
    written = json.loads((folder / CONFIG).read_text())
    ours = {"density", "basis", "sparse", "very_sparse", "save_projection",
            "projection_prng_key"}  # fmt: skip
    extra = {k: v for k, v in adapter.settings.items() if k not in ours | written.keys()}
    (folder / CONFIG).write_text(json.dumps(written | extra, indent=2, sort_keys=True) + "\n")

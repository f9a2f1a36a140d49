"""`RandLoraConfig`: PEFT's, plus any density and bases that are saved as a seed."""

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..basis import BasisDescription
from ..basis.description import SPECIFICATIONS, check_kind, check_r, check_seed
from ..nn.linear import check_alpha

KINDS = ("peft", *SPECIFICATIONS)
# The type in files that stock PEFT cannot open: its error quotes a type that it does not know.
NEEDS_OURS = "RANDLORA; needs randlora_ext: import randlora_ext.peft; randlora_ext.peft.enable()"
PEFT_TYPES = (PeftType.RANDLORA.value, NEEDS_OURS)
_SPARSE = "sparse", "very_sparse"

_METADATA = "randlora_ext"  # the entry of a safetensors header
_RECORDED = (  # a key says all of our own bases
    "r", "randlora_alpha", "projection_prng_key", "sparse", "very_sparse", "save_projection",
    "target_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
)  # fmt: skip


@dataclass
class RandLoraConfig(peft.RandLoraConfig):
    """PEFT's ``RandLoraConfig`` with all its fields, and two more.

    Args:
        basis: "peft" draws the bases that stock PEFT draws from ``projection_prng_key``.
            "hadamard" and "independent" generate those of docs/basis-spec.md on the device and
            save only the seed.
        density: share of non-zeros in independent bases, in (0, 1]; None means 1/3. Alone it means
            basis="independent".

    With "hadamard" and "independent", ``projection_prng_key`` becomes a text that describes the
    bases, for example ``randlora_ext:independent-1:density=0.07:seed=42``. A configuration with
    this field alone has the same bases. Stock PEFT refuses the file: its ``peft_type`` says what to
    type, and PEFT's error quotes that.

    Raises:
        TypeError, ValueError: r, randlora_alpha or a field of the bases is not allowed, or
            contradicts another.
        RuntimeError: the key is a text, and `randlora_ext.peft.enable` has not been called.
    """

    density: float | None = field(
        default=None, metadata={"help": "Share of non-zeros in independent bases, in (0, 1]"}
    )
    basis: str = field(
        default="peft",
        metadata={"help": '"peft": as PEFT draws them; "hadamard", "independent": only a seed'},
    )

    def __post_init__(self) -> None:
        check_r(self.r)
        check_alpha("randlora_alpha", self.randlora_alpha)
        generated = description_of(vars(self))
        if generated is not None:
            self.save_projection = True  # else PEFT would warn that bases may be lost
        super().__post_init__()
        if generated is not None:
            key: Any = generated.key()
            self.basis, self.density = generated.kind, generated.density
            self.projection_prng_key, self.save_projection = key, False
        if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] is RandLoraConfig:
            return
        if generated is not None:
            raise RuntimeError(
                f"basis={self.basis!r} needs randlora_ext.peft.enable() to be called first; stock "
                "PEFT has no such bases"
            )
        warnings.warn(
            "randlora_ext.peft.enable() has not been called: until it is, a model of this "
            "configuration has PEFT's own layers, without our kernels",
            stacklevel=3,  # where the configuration is made
        )

    def to_dict(self) -> dict:
        """PEFT's dictionary, with our fields only if PEFT's cannot describe the bases."""
        values = super().to_dict()
        if self.basis == "peft":
            return {k: v for k, v in values.items() if k not in ("basis", "density")}
        return values | {"peft_type": NEEDS_OURS}


def description_of(fields: Mapping[str, Any]) -> BasisDescription | None:
    """What generates an adapter's bases; None if PEFT draws them from its own fields.

    Args:
        fields: of a configuration, ours or PEFT's, from an object or a file. A text in
            ``projection_prng_key`` is complete; the other fields may only agree with it.

    Raises TypeError or ValueError, naming the field, what it was and what is allowed.
    """
    kind, density = fields.get("basis", "peft"), fields.get("density")
    key, flags = fields["projection_prng_key"], [n for n in _SPARSE if fields.get(n)]
    check_kind("basis", kind, KINDS)
    BasisDescription("independent", density, 0)  # whether it is a density
    if isinstance(key, str):
        try:
            made = BasisDescription.parse(key)
        except ValueError as error:
            raise ValueError(f"projection_prng_key: {error}") from error
        if kind not in ("peft", made.kind) or density not in (None, made.density) or flags:
            raise ValueError(
                f"projection_prng_key={key!r} contradicts basis={kind!r}, density={density}, "
                f"flags {flags}; the text says all, give it alone"
            )
        return made
    if kind != "peft" or density is not None:
        kind = "independent" if kind == "peft" else kind
        if flags:
            raise ValueError(f"{flags[0]} is of PEFT's own bases; basis={kind!r} takes a density")
        check_seed("projection_prng_key", key)
        return BasisDescription(kind, density, key)
    return None


def other_bases(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """How the bases of the configuration `saved` differ from those of `own`, in words."""
    mine, theirs = _bases_in_words(own), _bases_in_words(saved)
    return [] if mine == theirs else [f"its bases are {theirs}, not {mine}"]


def _bases_in_words(fields: Mapping[str, Any]) -> str:
    if (made := description_of(fields)) is not None:
        return made.key()
    # very_sparse overrules the other flag
    flag = next((name for name in reversed(_SPARSE) if fields.get(name)), "uniform")
    return f"PEFT's, {flag}, of projection_prng_key={fields['projection_prng_key']}"


# ---- tensors that record the configuration to which they belong ----------------------------------


def record_configurations(folder: Path) -> None:
    """Writes into every safetensors file which configuration it belongs to.

    A process may be killed between renaming the tensors and renaming the configuration. Two
    adapters of the same shapes cannot be told apart otherwise.
    """
    for config in folder.rglob(CONFIG_NAME):
        tensors = config.with_name(SAFETENSORS_WEIGHTS_NAME)
        if tensors.exists():
            fields = json.loads(config.read_text())
            text = json.dumps({name: fields[name] for name in _RECORDED})
            new = tensors.with_suffix(".recorded")
            save_file(load_file(tensors), new, metadata={"format": "pt", _METADATA: text})
            os.replace(new, tensors)


def recorded_configuration(folder: str | os.PathLike) -> dict | None:
    """What `record_configurations` wrote; None for other files, and for those of the hub."""
    try:
        with safe_open(Path(folder, SAFETENSORS_WEIGHTS_NAME), "pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
    except (OSError, SafetensorError):  # whoever reads the tensors reports more
        return None
    return None if text is None else json.loads(text)


@contextmanager
def one_save(folder: str | os.PathLike, hub: dict[str, Any]) -> Iterator[str | os.PathLike]:
    """A folder with one save's configuration and tensors while other processes save.

    Saving replaces files and writes into none, so an open file stays as it is, and its path under
    /proc reads it again and again. Folders that we have not saved are given back, as are those of
    the hub.

    Args:
        hub: arguments for PEFT's reading beside the folder. A subfolder is taken out of it if the
            folder given is that.

    Raises ValueError if configuration and tensors are not from one save.
    """
    place = Path(folder, hub.get("subfolder") or "")
    with TemporaryDirectory() as temporary, ExitStack() as held:
        for wait in (0.02, 0.2, 0):  # for a save that is between its files
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                link = Path(temporary, name)
                link.unlink(missing_ok=True)
                with suppress(OSError):
                    file = held.enter_context(open(place / name, "rb"))
                    link.symlink_to(f"/proc/self/fd/{file.fileno()}")
            if (recorded := recorded_configuration(temporary)) is None:
                yield folder
                return
            if not (differences := _differences(Path(temporary, CONFIG_NAME), recorded)):
                break
            time.sleep(wait)
        else:
            raise ValueError(
                f"{place / CONFIG_NAME} does not belong to the {SAFETENSORS_WEIGHTS_NAME} beside "
                f"it, whose {', '.join(differences)}: a save was interrupted, or the file was "
                "edited. Save the adapter again, or pass config= to load it with other fields"
            )
        hub.pop("subfolder", None)
        yield temporary


def _differences(config: Path, recorded: dict) -> list[str]:
    own = dict(json.loads(config.read_text())) if config.exists() else recorded
    return [
        f"{name} is {recorded[name]!r}, not {own.get(name)!r}"
        for name in _RECORDED
        if recorded[name] != own.get(name)
    ]

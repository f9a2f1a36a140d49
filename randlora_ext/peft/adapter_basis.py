"""`AdapterBasis`: which bases an adapter multiplies by, as its configuration says, and A and B."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.randlora.model import RandLoraModel
from torch import Tensor, nn

from ..basis import BasisDescription
from ..basis.description import SPECIFICATIONS, check_kind, check_seed
from .ternary_tensor import TernaryTensor

BASIS_NAMES = ("randlora_A", "randlora_B")  # PEFT's attributes of models and layers

KINDS = ("peft", *SPECIFICATIONS)
SPARSE = 1 / 3
VERY_SPARSE = "very_sparse"  # the density 1 / sqrt(d), a number once there is a model

# Two variants of a BasisDescription's key: its text, and what replaces that in the variant.
_PEFT = "randlora_ext:independent-", "randlora_ext:peft-"
_VERY_SPARSE = ":density=1.0:", f":density={VERY_SPARSE}:"


@dataclass(frozen=True)
class AdapterBasis:
    """What decides an adapter's bases, beside r and the sizes of its layers.

    Args:
        kind: "peft", drawn as PEFT draws them, or a kind of `BasisDescription`.
        density: share of non-zeros; `VERY_SPARSE`; or None for PEFT's uniform bases.
        seed: PEFT's ``projection_prng_key``.

    Raises:
        TypeError, ValueError: naming the value, what it was and what is allowed.
    """

    kind: str
    density: float | str | None
    seed: Any

    def __post_init__(self) -> None:
        if self.known_to_stock:  # torch takes it as 64 bits, also negative
            if isinstance(self.seed, bool) or not isinstance(self.seed, int):
                raise TypeError(f"projection_prng_key must be an integer, got {self.seed!r}")
            if not -(2**63) <= self.seed < 2**64:
                raise ValueError(f"projection_prng_key must be in [-2**63, 2**64), got {self.seed}")
            return
        check_seed("projection_prng_key", self.seed)
        self.description(1)  # checks the density

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "AdapterBasis":
        """Translates the fields of a configuration: ours or PEFT's, from an object or a file.

        A text in ``projection_prng_key`` is complete; the other fields may only agree with it.

        Raises:
            TypeError, ValueError: naming the field, what it was and what is allowed.
        """
        kind, density = fields.get("basis", "peft"), fields.get("density")
        key = fields["projection_prng_key"]
        check_kind("basis", kind, KINDS)
        if isinstance(density, bool) or not isinstance(density, (int, float, type(None))):
            raise TypeError(f"density must be None or a number in (0, 1], got {density!r}")
        if density is not None and not 0.0 < density <= 1.0:
            raise ValueError(f"density must be None or in (0, 1], got {density}")
        sparse, very_sparse = bool(fields.get("sparse")), bool(fields.get("very_sparse"))
        flag = VERY_SPARSE if very_sparse else SPARSE if sparse else None
        if density is not None and flag not in (None, density):
            raise ValueError(
                f"density={density} contradicts sparse={sparse}, very_sparse={very_sparse}; give "
                "either a density or one of the flags"
            )
        chosen = flag if density is None else float(density)
        if not isinstance(key, str):
            if kind == "independent" and chosen is None:
                chosen = SPARSE
            return cls(kind, chosen, key)
        try:
            made = cls.parse(key)
        except ValueError as error:
            raise ValueError(f"projection_prng_key: {error}") from error
        if kind not in ("peft", made.kind) or chosen not in (None, made.density):
            raise ValueError(
                f"projection_prng_key={key!r} contradicts basis={kind!r}, density={density}, "
                f"sparse={sparse}, very_sparse={very_sparse}; the text says all, give it alone"
            )
        return made

    @classmethod
    def parse(cls, text: str) -> "AdapterBasis":
        """The bases whose `key` is `text`; ValueError if `text` is not a key."""
        drawn = text.replace(_PEFT[1], _PEFT[0])
        plain = drawn.replace(_VERY_SPARSE[1], _VERY_SPARSE[0])
        described = BasisDescription.parse(plain)
        kind = described.kind if drawn == text else "peft"
        density = described.density if plain == drawn else VERY_SPARSE
        made = cls(kind, density, described.seed)
        if made.key != text:  # such as a text where stock PEFT's fields suffice
            raise ValueError(f"{text!r} is no key; projection_prng_key must be {made.key!r}")
        return made

    @property
    def known_to_stock(self) -> bool:
        """Whether stock PEFT draws these bases from its own fields."""
        return self.kind == "peft" and self.density in (None, SPARSE, VERY_SPARSE)

    @property
    def key(self) -> Any:
        """What ``projection_prng_key`` holds: a number if stock PEFT draws these bases.

        Otherwise a text that describes them completely and that stock PEFT refuses.
        """
        if self.known_to_stock:
            return self.seed
        text = self.description(1).key()
        text = text.replace(*_PEFT) if self.kind == "peft" else text
        return text.replace(*_VERY_SPARSE) if self.density == VERY_SPARSE else text

    def description(self, d: int) -> BasisDescription:
        """The description of generated bases if the largest min(in, out) of the layers is `d`."""
        density: Any = 1 / math.sqrt(d) if self.density == VERY_SPARSE else self.density
        kind = "independent" if self.kind == "peft" else self.kind
        return BasisDescription(kind, density, self.seed)


def other_bases(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """How the bases of the configuration `saved` differ from those of `own`, in words."""
    mine, theirs = AdapterBasis.of(own), AdapterBasis.of(saved)
    names = {"projection_prng_key": "seed", "basis": "kind", "density": "density"}
    return [
        f"{name} is {getattr(theirs, value)!r}, not {getattr(mine, value)!r}"
        for name, value in names.items()
        if getattr(theirs, value) != getattr(mine, value)
    ]


def largest(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(D, d) of the bases that PEFT shares among layers of these (in_features, out_features)."""
    d, D = sorted(max(each) for each in zip(*sizes, strict=True))
    return D, d


def make_bases(config: peft.RandLoraConfig, D: int, d: int) -> tuple[Tensor, Tensor]:
    """A (r, 1, d) and B (D, n, r) of a new adapter: generated, or drawn by PEFT.

    Raises ValueError if the density leaves no non-zero in one of them.
    """
    basis, r = AdapterBasis.of(vars(config)), config.r
    if basis.kind != "peft":
        described = basis.description(d)
        A, B = (
            TernaryTensor.generated(described, *role)
            for role in enumerate(((r, 1, d), (D, -(-d // r), r)))
        )
        return A, B
    stock = copy.copy(config)
    stock.projection_prng_key = basis.seed
    made, name = _Drawing(D, d), "default"
    with torch.device("cpu"):  # real values, also for a model on the meta device
        if basis.known_to_stock:
            made._pre_injection_hook(made, stock, name)
        else:
            made._init_randlora_A_randlora_B_sparse(stock, name, 1 / float(basis.density or 0))
    A, B = (getattr(made, each)[name] for each in BASIS_NAMES)
    for each, matrix in zip(BASIS_NAMES, (A, B), strict=True):
        if not bool(matrix.isfinite().all()):  # PEFT divides by the standard deviation, 0
            raise ValueError(
                f"density={basis.density} leaves no non-zero in {each} {tuple(matrix.shape)}; "
                f"it must be well above 1 / {matrix.numel()}"
            )
    return A, B


class _Drawing(RandLoraModel):
    """PEFT's drawing, with the largest sizes instead of a model in which to look for them."""

    def __init__(self, D: int, d: int) -> None:
        nn.Module.__init__(self)
        self.sizes = D, d

    def _find_dim(self, config) -> tuple[int, int]:
        return self.sizes

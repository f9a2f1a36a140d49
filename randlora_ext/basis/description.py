"""What decides the elements of A and B, whatever the layer's shape, and its form in saved files."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

# The version of docs/basis-spec.md that defines each kind.
SPECIFICATIONS = {"independent": 1, "block": 1}
_KEY = re.compile(r"randlora_ext:([a-z]+)-(\d+):density=([^:]+):seed=(\d+)")


@dataclass(frozen=True)
class BasisDescription:
    """The three values from which A and B are generated: equal descriptions, equal elements.

    Args:
        kind: "independent", every element drawn independently; "block", dense blocks in 1 / density
            groups (docs/basis-spec.md).
        density: share of non-zeros, in (0, 1]; 1 / G for an integer G if kind is "block".
        seed: 0 <= seed < 2**64.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """

    kind: str
    density: float
    seed: int

    def __post_init__(self) -> None:
        kind, density = self.kind, self.density
        check_kind("kind", kind)
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise TypeError(f"density must be a number in (0, 1], got {density!r}")
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {density}")
        check_seed("seed", self.seed)
        object.__setattr__(self, "density", float(density))
        if kind == "block" and (density < 2**-31 or 1 / self.groups != self.density):
            nearest = f"; the nearest is 1 / {self.groups}" if density >= 2**-31 else ""
            raise ValueError(
                f"density of block bases must be 1 / G for an integer G, got {density}{nearest}"
            )

    @property
    def groups(self) -> int:
        """G of block bases."""
        return round(1 / self.density)

    def key(self) -> str:
        """The text that a saved file holds; `parse` reads it back exactly.

        For example ``randlora_ext:independent-1:density=0.07:seed=42``.
        """
        version = SPECIFICATIONS[self.kind]
        return f"randlora_ext:{self.kind}-{version}:density={self.density!r}:seed={self.seed}"

    @classmethod
    def parse(cls, text: str) -> "BasisDescription":
        """The description whose `key` is `text`.

        Raises:
            ValueError: `text` is not such a key, or has a kind or specification that this version
                does not know.
        """
        example = cls("independent", 0.07, 42).key()
        match = _KEY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} is no key of a basis, which looks like {example!r}")
        kind, version, density, seed = match.groups()
        if str(SPECIFICATIONS.get(kind)) != version:
            known = ", ".join(f"{name}-{number}" for name, number in SPECIFICATIONS.items())
            raise ValueError(
                f"{text!r} is of basis specification {kind}-{version}; this version of "
                f"randlora_ext knows {known}"
            )
        try:
            made = cls(kind, float(density), int(seed))
        except ValueError as error:
            raise ValueError(f"{text!r} is no key of a basis: {error}") from error
        if made.key() != text:  # such as 0.30 or 007
            raise ValueError(f"{text!r} is no key of a basis; it must read {made.key()!r}")
        return made


def default_density(kind: str) -> float:
    """The density if the caller names none: 1/3, as PEFT's ``sparse``, or 1/8 for block bases."""
    return 1 / 8 if kind == "block" else 1 / 3


def check_kind(name: str, kind: str, known: Iterable[str] = SPECIFICATIONS) -> None:
    """Raises ValueError, naming `name` and the nearest of `known`, unless `kind` is one of them."""
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"{name} must be one of {[*known]}, got {kind!r}{did_you_mean(kind, known)}"
        )


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of an error message: the nearest of `known`, if one is near."""
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_seed(name: str, seed: int) -> None:
    """Raises TypeError or ValueError, naming `name`, unless `seed` is an integer in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an integer in [0, 2**64), got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} must be an integer in [0, 2**64), got {seed}")


def as_signed(seed: int) -> int:
    """The same 64 bits as the signed integer that an operator takes."""
    return seed - 2**64 if seed >= 2**63 else seed

"""What decides A and B: a description their elements, the layer's shape their sizes."""

import re
from dataclasses import dataclass

from ..checks import check_integer, check_number, check_one_of, check_r, check_seed

# The version of docs/basis-spec.md that defines each kind.
SPECIFICATIONS = {"independent": 1, "hadamard": 1}
_KEY = re.compile(r"randlora_ext:([a-z]+)-\d+(?::density=([^:]+))?:seed=(\d+)")


@dataclass(frozen=True)
class BasisDescription:
    """The values from which A and B of any layer are generated: equal descriptions, equal elements.

    Arguments and errors are those of `Basis`. The density of Hadamard bases is None.
    """

    kind: str
    density: float | None
    seed: int

    def __post_init__(self) -> None:
        kind, density = self.kind, self.density
        check_one_of("kind", kind, SPECIFICATIONS)
        check_seed("seed", self.seed)
        if kind == "hadamard":
            if density is not None:
                raise ValueError(f"density must be None for Hadamard bases, got {density!r}")
            return
        density = 1 / 3 if density is None else density
        check_number("density", density, "a number in (0, 1]", lambda v: 0 < v <= 1)
        object.__setattr__(self, "density", float(density))

    def key(self) -> str:
        """The text that a saved file holds; `parse` reads it back exactly.

        For example ``randlora_ext:hadamard-1:seed=42`` or
        ``randlora_ext:independent-1:density=0.07:seed=42``.
        """
        density = "" if self.density is None else f":density={self.density!r}"
        return f"randlora_ext:{self.kind}-{SPECIFICATIONS[self.kind]}{density}:seed={self.seed}"

    @classmethod
    def parse(cls, text: str) -> "BasisDescription":
        """The description whose `key` is `text`.

        Raises:
            ValueError: `text` is not such a key, or has a kind or specification that this version
                does not know.
        """
        match = _KEY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(_not_a_key(text))
        kind, density, seed = match.groups()
        try:
            description = cls(kind, None if density is None else float(density), int(seed))
        except ValueError as error:
            raise ValueError(f"{_not_a_key(text)}: {error}") from error
        if description.key() != text:  # such as another specification, 0.30 or 007
            raise ValueError(f"{_not_a_key(text)}; the nearest is {description.key()!r}")
        return description


def _not_a_key(text: object) -> str:
    known = ", ".join(f"{kind}-{version}" for kind, version in SPECIFICATIONS.items())
    return (
        f"{text!r} is no key of a basis that this version of randlora_ext knows ({known}), such as "
        "'randlora_ext:independent-1:density=0.07:seed=42'"
    )


def as_signed(seed: int) -> int:
    """The same 64 bits as the signed integer that an operator takes."""
    return seed - 2**64 if seed >= 2**63 else seed


class Shape:
    """The sizes of an adapter's matrices: A (r, d), B (D, K), lambda (r, n), gamma (n, d).

    Raises TypeError or ValueError unless the three given ones are integers in their ranges.
    """

    def __init__(self, in_features: int, out_features: int, r: int) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            check_integer(name, value, 1, 2**63 - 1, "[1, 2**63)")
        check_r(r)
        # Attributes, not properties: a call reads a dozen of them.
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.d, self.D = sorted((in_features, out_features))
        self.n = -(-self.d // r)
        self.K = self.n * r
        self.expand = in_features <= out_features  # whether d is the input side
        self.lam_shape = (r, self.n)
        self.gam_shape = (self.n, self.d)

"""The sizes of a layer and of its bases."""

from dataclasses import dataclass, field, replace

# Memory and time grow with r, which a file may name. No layer needs r > d.
MAX_R = 2**16


@dataclass(frozen=True)
class Shape:
    """The sizes of an adapter's matrices: A (r, d), B (D, K), lambda (r, n), gamma (n, d).

    Raises TypeError or ValueError unless the three given ones are positive integers, and r is at
    most `MAX_R`.
    """

    in_features: int
    out_features: int
    r: int
    d: int = field(init=False)
    D: int = field(init=False)
    n: int = field(init=False)
    K: int = field(init=False)
    expand: bool = field(init=False)  # whether d is the input side

    def __post_init__(self) -> None:
        _check_positive("in_features", self.in_features)
        _check_positive("out_features", self.out_features)
        check_r(self.r)
        d, D = sorted((self.in_features, self.out_features))
        n = -(-d // self.r)
        # Plain attributes: torch.compile cannot trace a cached_property.
        for name, value in (("d", d), ("D", D), ("n", n), ("K", n * self.r)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "expand", self.in_features <= self.out_features)

    def transposed(self) -> "Shape":
        return replace(self, in_features=self.out_features, out_features=self.in_features)

    @property
    def of_matrices(self) -> tuple[int, int, int]:
        """The sizes that decide A and B; the layer's orientation does not."""
        return self.D, self.d, self.r

    @property
    def wide(self) -> bool:
        """Whether list positions need 32 bits."""
        return max(self.D, self.d, self.K) > 65536


def check_r(r: int) -> None:
    """TypeError or ValueError unless `r` is an integer in [1, `MAX_R`]."""
    _check_positive("r", r)
    if r > MAX_R:
        raise ValueError(f"r must be at most {MAX_R}, got {r}")


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive integer, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value}")

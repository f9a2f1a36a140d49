"""Sizes of a layer, or of the part of one that a rank of tensor parallelism holds."""

from dataclasses import dataclass, field, replace

# Memory and time grow with r, which a file may name. No layer needs r > d.
MAX_R = 2**16


@dataclass(frozen=True)
class Shape:
    """The sizes of an adapter's matrices: A (r, d), B (D, K), lambda (r, n), gamma (n, d).

    In a whole layer (`Shape.of`) d is the smaller side and n = ceil(d / r). A slice (`part`) keeps
    the layer's n and K and its orientation, so the slice's d may exceed its D.
    """

    in_features: int
    out_features: int
    r: int
    n: int
    expand: bool  # whether d is the input side
    layer_d: int
    layer_D: int
    first_row: int = 0  # of B
    first_column: int = 0  # of A
    is_slice: bool = False
    d: int = field(init=False, compare=False)
    D: int = field(init=False, compare=False)
    K: int = field(init=False, compare=False)

    @classmethod
    def of(cls, in_features: int, out_features: int, r: int) -> "Shape":
        """The shape of a whole layer.

        TypeError or ValueError unless all are positive integers, and r at most `MAX_R`.
        """
        _check_positive("in_features", in_features)
        _check_positive("out_features", out_features)
        check_r(r)
        d, D = sorted((in_features, out_features))
        expand = in_features <= out_features
        return cls(in_features, out_features, r, -(-d // r), expand, d, D)

    def part(self, inputs: range, outputs: range) -> "Shape":
        """The slice for these inputs and outputs: `self` if they are all.

        TypeError or ValueError for a bad range.
        """
        for name, span, size in (
            ("inputs", inputs, self.in_features),
            ("outputs", outputs, self.out_features),
        ):
            if not isinstance(span, range):
                raise TypeError(f"{name} must be a range, got {span!r}")
            if span.step != 1 or not 0 <= span.start < span.stop <= size:
                raise ValueError(
                    f"{name} must be a non-empty range of step 1 within range(0, {size}), "
                    f"got {span}"
                )
        if (len(inputs), len(outputs)) == (self.in_features, self.out_features):
            return self  # a rank that holds the whole layer packs what the layer packs
        small, large = (inputs, outputs) if self.expand else (outputs, inputs)
        return replace(
            self,
            in_features=len(inputs),
            out_features=len(outputs),
            first_row=self.first_row + large.start,
            first_column=self.first_column + small.start,
            is_slice=True,
        )

    def transposed(self) -> "Shape":
        return replace(
            self,
            in_features=self.out_features,
            out_features=self.in_features,
            expand=not self.expand,
        )

    def __post_init__(self) -> None:
        # Plain attributes: torch.compile cannot trace a cached_property.
        small, large = self.in_features, self.out_features
        if not self.expand:
            small, large = large, small
        for name, value in (("d", small), ("D", large), ("K", self.n * self.r)):
            object.__setattr__(self, name, value)

    @property
    def of_matrices(self) -> tuple[int, ...]:
        """The sizes that decide A and B; the layer's orientation does not."""
        at = self.first_row, self.first_column, self.layer_d, self.layer_D
        return (self.D, self.d, self.r, self.n, *at)

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

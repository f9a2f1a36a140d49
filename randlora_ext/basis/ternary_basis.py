"""`TernaryBasis`: the random matrices A and B of a layer, and their packed form on a device."""

import weakref

import torch
from torch import Tensor

from .. import devices
from .cache import PackedTensors, get_or_make, with_index
from .dense import DenseMatrices
from .description import BasisDescription
from .generated import GeneratedMatrices
from .hadamard import HadamardMatrices
from .imported import ImportedMatrices, pack_layer
from .shape import Shape
from .ternary_matrices import TernaryMatrices
from .tracing import new_token, run_while_tracing


class TernaryBasis:
    """The pair of fixed ternary bases of one layer shape: a description, packed on first use.

    A (r, d) and B (D, K) have the values -1 and +1 or, if independent, ``{-1, 0, +1} /
    sqrt(density)``. They are a pure function of the seed (docs/basis-spec.md), equal on every
    device. `from_dense` makes a basis from any given matrices.

    Args:
        in_features: of the base layer.
        out_features: likewise; d = min, D = max of the two.
        r: rank of one base, at most 65,536; n = ceil(d / r) bases, K = n * r.
        density: share of non-zeros of independent bases, in (0, 1]. None means 1/3, PEFT's
            ``sparse``. Hadamard bases have no zeros and take none.
        seed: 0 <= seed < 2**64; PEFT's ``projection_prng_key``.
        kind: "independent": every element is drawn independently, each sign with probability
            ``density / 2``. "hadamard": A and B are parts of Hadamard matrices with random signs,
            so that a product with A costs as many multiply-adds as gamma has elements, and one
            with B only additions.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    Bases of equal shape and description are equal; imported and dense ones compare the identity of
    their matrices. A basis never changes, so a deep copy is the same object. Pickling writes the
    description or, for imported (`from_ternary`, `from_planes`) and dense ones, the matrices.
    Source: paper section 4.3 (sparse bases) and PEFT's ``_init_randlora_A_randlora_B_sparse``;
    Hadamard bases are ours.
    """

    _shape: Shape
    _source: TernaryMatrices | HadamardMatrices | DenseMatrices
    _packed: dict[tuple, PackedTensors]  # by device, and dtype of a dense B or None
    token: str  # of this object, in this process: compiled code guards on it

    def __new__(cls, *args, **kwargs) -> "TernaryBasis":
        self = super().__new__(cls)
        self._packed, self.token = {}, new_token()
        return self

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        density: float | None = None,
        seed: int = 0,
        kind: str = "independent",
    ) -> None:
        self._shape = Shape.of(in_features, out_features, r)
        generated = HadamardMatrices if kind == "hadamard" else GeneratedMatrices
        self._source = generated(BasisDescription(kind, density, seed))
        self._source.check(self._shape)

    @classmethod
    def from_ternary(
        cls, A: Tensor, B: Tensor, in_features: int, out_features: int
    ) -> "TernaryBasis":
        """Imports dense bases in PEFT's layout exactly.

        Args:
            A: (r, >= d) or (r, 1, >= d), values in {-a, 0, +a}.
            B: (>= D, >= n, r) or (D, K), values in {-b, 0, +b}. PEFT's memory order is kept:
                flat column c belongs to rank index c // n and base c % n.

        Raises:
            ValueError: a shape is too small, or a matrix is not ternary (PEFT's default bases are
                uniform; they have no packed form).
        """
        features = in_features, out_features
        return cls.from_planes(*pack_layer(A, B, *features), *features)

    @classmethod
    def from_planes(
        cls,
        a_planes: Tensor,
        b_planes: Tensor,
        a_value: float,
        b_value: float,
        in_features: int,
        out_features: int,
    ) -> "TernaryBasis":
        """Imports the first d columns of A and (D, K) elements of B from bit planes.

        Do not write to the planes afterwards.

        Args:
            a_planes: (2, r, >= ceil(d / 64)) int64, all r rows.
            b_planes: (2, >= D, >= ceil(K / 64)) int64.
            a_value: what +1 stands for in A.
            b_value: what +1 stands for in B.

        Raises:
            ValueError: a shape is too small, or an element is +1 and -1 at once.
        """
        shape = Shape.of(in_features, out_features, a_planes.shape[1])
        planes = a_planes, b_planes, a_value, b_value
        return cls._of(shape, ImportedMatrices.of(*planes, shape))

    @classmethod
    def from_dense(
        cls, matrices: DenseMatrices, in_features: int, out_features: int
    ) -> "TernaryBasis":
        """A basis of dense A and B of any values; products use the tensors themselves.

        Do not write to them afterwards. ValueError if one is too small.
        """
        return cls._of(Shape.of(in_features, out_features, matrices.A.shape[0]), matrices)

    @classmethod
    def _of(
        cls, shape: Shape, source: TernaryMatrices | HadamardMatrices | DenseMatrices
    ) -> "TernaryBasis":
        source.check(shape)
        self = cls.__new__(cls)
        self._shape, self._source = shape, source
        return self

    in_features = property(lambda self: self._shape.in_features)
    out_features = property(lambda self: self._shape.out_features)
    r = property(lambda self: self._shape.r)
    n = property(lambda self: self._shape.n)
    K = property(lambda self: self._shape.K)
    d = property(lambda self: self._shape.d)
    D = property(lambda self: self._shape.D)
    expand = property(lambda self: self._shape.expand, doc="Whether d is the input side.")
    density = property(lambda self: self._source.density, doc="Share of non-zeros, in (0, 1].")
    scale = property(
        lambda self: self._source.scale,
        doc="What the product of the unscaled matrices must be multiplied by.",
    )

    @property
    def description(self) -> BasisDescription | None:
        """Kind, density and seed; None for an imported or dense basis."""
        return self._source.description

    @property
    def kind(self) -> str:
        """``"independent"``, ``"hadamard"``, ``"imported"`` or ``"dense"``."""
        return self._source.kind

    @property
    def seed(self) -> int | None:
        """None for an imported or dense basis."""
        return None if self.description is None else self.description.seed

    @property
    def first_row(self) -> int:
        """The row of the layer's B with which a slice begins; 0 for a layer."""
        return self._shape.first_row

    @property
    def first_column(self) -> int:
        """The column of the layer's A with which a slice begins; 0 for a layer."""
        return self._shape.first_column

    @property
    def format(self) -> str:
        """``"lists"``, ``"planes"``, ``"hadamard"`` or ``"dense"`` (docs/formats.md)."""
        return self._source.format(self._shape)

    def packed(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The tensors of the bases that ``torch.ops.randlora`` takes, as `format` says.

        Lists: ``[a_offset, a_index, a_tables, b_row_offset, b_row_index, b_col_offset,
        b_col_index]``; planes: ``[a_offset, a_index, a_tables, b_planes]``; Hadamard: the signs
        ``[s, row, col]``; dense: ``[A, B]`` (docs/formats.md).
        They are made on first use and shared by all layers of equal shape and description on that
        device, as long as one of them lives.

        Warns if A or B has no non-zero element at all: such an adapter cannot learn.
        """
        return self._cached(device, None)

    def dense_b(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """B unscaled (-1, 0, +1) as a factor of GEMMs, made once and shared like `packed`.

        (D, K); dense bases give B itself.
        """
        return self._cached(device, dtype)[0]

    def _cached(self, device: torch.device | str, dtype: torch.dtype | None) -> list[Tensor]:
        """The packed form or, for a dtype, the dense B."""
        if torch.compiler.is_dynamo_compiling():
            name = self._while_tracing(self.token, torch.device(device), dtype)
            return getattr(self, name).tensors
        found = self._packed.get((device, dtype))  # found at once for a tensor's device
        if found is None:
            on = with_index(torch.device(device))
            key = self._shape.of_matrices, self._source, on, dtype
            found = self._packed[on, dtype] = get_or_make(key, on, lambda: self._make(on, dtype))
        return found.on_current_stream()

    def _make(self, device: torch.device, dtype: torch.dtype | None) -> list[Tensor]:
        # "meta" needs the CPU's, too: the lengths of lists depend on the elements.
        if self._source.needs_kernels and not devices.serve(device.type):
            return [t.to(device) for t in self._cached("cpu", dtype)]
        if dtype is None:
            return self._source.pack(self._shape, device, repr(self))
        return [self._source.dense_b(self._shape, device, dtype, self.packed)]

    # Dynamo calls this with constants while it traces (torch 2.11 takes no object as an argument)
    # and finds the tensors as an attribute, which makes them inputs of the graph. Constants of the
    # graph would live as long as it does, and no guard could tell that a model has moved.
    @run_while_tracing
    def _while_tracing(self, token: str, device: torch.device, dtype: torch.dtype | None) -> str:
        self._cached(device, dtype)
        made = self._packed[with_index(device), dtype]
        name = f"_cached_{device}_{str(dtype).removeprefix('torch.')}"  # Dynamo refuses the dot
        for tensor in made.tensors:  # no symbolic sizes, and CUDA graphs need not copy them
            torch._dynamo.mark_static(tensor)
            torch._dynamo.mark_static_address(tensor, guard=False)
        setattr(self, name, made)
        return name

    def packed_bytes(self, device: torch.device | str = "cpu") -> int:
        """Bytes of the packed form on that device."""
        return sum(t.numel() * t.element_size() for t in self.packed(device))

    def dense(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """The scaled dense bases A (r, d) and B (D, K), newly made: for tests, export and study."""
        return self._source.dense(self._shape, torch.device(device), dtype)

    def dense_a(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """A (r, d) alone, scaled."""
        return self._source.dense_a(self._shape, torch.device(device), dtype, self.packed)

    def transposed(self) -> "TernaryBasis":
        """The same matrices for a layer with in and out swapped; packed tensors are shared."""
        return self._of(self._shape.transposed(), self._source)

    def slice(self, inputs: range | None = None, outputs: range | None = None) -> "TernaryBasis":
        """The part for a rank that holds these inputs and outputs of the layer; None means all.

        It has the rows of B for the features on the D side, and the columns of A for those on the
        d side. A rank generates them from the seed without communication; imported and dense bases
        are cut from the whole. r, n, K and the orientation stay the layer's; lambda (r, n) is
        complete, gamma (n, d) has the slice's d (docs/distributed.md).

        Raises:
            TypeError, ValueError: a range of another step, empty, or outside the layer.
        """
        inputs = range(self.in_features) if inputs is None else inputs
        outputs = range(self.out_features) if outputs is None else outputs
        return self._of(self._shape.part(inputs, outputs), self._source)

    def canonical(self) -> "TernaryBasis":
        """The first living basis equal to this one, which layers hold.

        One object for all layers of a shape means one dictionary of packed tensors and one guard
        of torch.compile: what was compiled for one layer serves the others.
        """
        return _by_key.setdefault(self._key(), self)

    def _key(self) -> tuple:
        return self._shape, self._source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TernaryBasis) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: dict) -> "TernaryBasis":
        return self

    def __getstate__(self) -> dict:
        return {"_shape": self._shape, "_source": self._source}

    def __repr__(self) -> str:
        origin = self.kind if self.description is None else f"seed={self.seed}, kind={self.kind!r}"
        if self._source.kind != "hadamard":
            origin = f"density={self.density:.6g}, {origin}"
        shape, part = self._shape, ""
        if shape.is_slice:
            part = f", slice from row {shape.first_row} of B and column {shape.first_column} of A"
        return (
            f"TernaryBasis({self.in_features}, {self.out_features}, r={self.r}, {origin}, "
            f"format={self.format!r}{part})"
        )


_by_key: "weakref.WeakValueDictionary[tuple, TernaryBasis]" = weakref.WeakValueDictionary()

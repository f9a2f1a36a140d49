"""What LoRA, PEFT's RandLoRA and ours hold and send: the rules behind `budget`."""

from collections.abc import Callable
from dataclasses import dataclass

from ..basis import TernaryBasis
from ..cost import choose_b_side

HALF, SINGLE = 2, 4  # bytes of bfloat16 and float32
TRAINED = 4 * SINGLE  # a parameter, its gradient and Adam's two moments


@dataclass(frozen=True)
class Layer:
    """A linear layer of every block, and how tensor parallelism cuts it."""

    name: str
    in_features: int
    out_features: int
    columns: bool  # cut by outputs

    @property
    def key(self) -> tuple[int, int, bool]:
        return self.in_features, self.out_features, self.columns


@dataclass(frozen=True)
class Setting:
    layers: tuple[Layer, ...]  # of one block
    blocks: int
    others: int  # parameters outside these layers: embeddings, head, norms
    gpus: int
    tokens: int  # of a step and GPU; under tensor parallelism of a step
    hidden: int

    def total(self, of: Callable[[Layer], float]) -> float:
        return self.blocks * sum(of(layer) for layer in self.layers)

    @property
    def weights(self) -> float:
        return self.total(lambda layer: layer.in_features * layer.out_features) + self.others

    def all_reduce(self, size: float) -> float:
        """Bytes that each GPU sends in a ring."""
        return 2 * (self.gpus - 1) / self.gpus * size

    def gather(self, size: float) -> float:
        """The same for an all-gather or a reduce-scatter of so many bytes in all."""
        return (self.gpus - 1) / self.gpus * size


# ---- the methods: all sizes in bytes ----------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    rank: int
    tensor_parallel = True

    @property
    def name(self) -> str:
        return f"LoRA, r = {self.rank}"

    def parameters(self, layer: Layer) -> int:
        return self.rank * (layer.in_features + layer.out_features)

    def parameters_of_a_rank(self, layer: Layer, gpus: int) -> float:
        """One of the two matrices is cut with the layer, the other whole."""
        cut, whole = layer.in_features, layer.out_features
        if layer.columns:
            cut, whole = whole, cut
        return self.rank * (whole + cut / gpus)

    def bases(self, setting: Setting, cut: bool) -> float:
        return 0.0

    def kept(self, layer: Layer, setting: Setting) -> float:
        return SINGLE * setting.tokens * self.rank

    def extra_per_step(self, layer: Layer, setting: Setting) -> float:
        # As PEFT over Megatron's layers: x A^T (T, r), summed forward or its gradient backward.
        return setting.all_reduce(SINGLE * setting.tokens * self.rank)

    def saved(self, setting: Setting) -> float:
        return SINGLE * setting.total(self.parameters)


@dataclass(frozen=True)
class RandLora:
    """What stock PEFT and this package have in common."""

    rank: int

    def basis(
        self, layer: Layer, density: float = 1.0, support: str = "independent"
    ) -> TernaryBasis:
        sizes = layer.in_features, layer.out_features
        return TernaryBasis(*sizes, self.rank, density, support=support)

    def parameters(self, layer: Layer) -> int:
        basis = self.basis(layer)
        return basis.K + basis.n * basis.d


@dataclass(frozen=True)
class Peft(RandLora):
    tensor_parallel = False

    @property
    def name(self) -> str:
        return f"PEFT RandLoRA, r = {self.rank}"

    def bases(self, setting: Setting, cut: bool) -> float:
        """One A and B for all layers, float32, for the widest input beside the widest output."""
        widest = (
            max(layer.in_features for layer in setting.layers),
            max(layer.out_features for layer in setting.layers),
        )
        d, D = min(widest), max(widest)
        return SINGLE * (self.rank * d + D * -(-d // self.rank) * self.rank)

    def kept(self, layer: Layer, setting: Setting) -> float:
        """A' (K, d), and where d is the output side x B (T, K)."""
        basis = self.basis(layer)
        activation = 0 if basis.expand else setting.tokens * basis.K
        return SINGLE * (basis.K * basis.d + activation)

    def saved(self, setting: Setting) -> float:
        """With ``save_projection``, the default: once for the model and once for every layer."""
        copies = 1 + setting.blocks * len(setting.layers)
        return SINGLE * setting.total(self.parameters) + copies * self.bases(setting, False)


@dataclass(frozen=True)
class Ours(RandLora):
    density: float
    label: str
    support: str = "independent"
    tensor_parallel = True

    @property
    def name(self) -> str:
        return f"ours, r = {self.rank}, {self.label}"

    def part(self, layer: Layer, gpus: int) -> TernaryBasis:
        """What a tensor-parallel rank holds."""
        basis = self.basis(layer, self.density, self.support)
        if layer.columns:
            return basis.slice(outputs=range(layer.out_features // gpus))
        return basis.slice(inputs=range(layer.in_features // gpus))

    def dense_b(self, setting: Setting) -> float:
        """On CUDA the factored path may hold B in the dtype of x, once for all layers alike."""
        held = self.held(setting, cut=True)
        many = setting.tokens * setting.gpus
        dense = [b for b in held if choose_b_side(b, many, "cuda") == "dense"]
        return sum(HALF * basis.D * basis.K for basis in dense)

    def held(self, setting: Setting, cut: bool) -> list[TernaryBasis]:
        """Layers of equal shape (and, cut, of equal style) share one basis."""
        alike: dict[tuple, TernaryBasis] = {}
        for layer in setting.layers:
            whole = self.basis(layer, self.density, self.support)
            basis = self.part(layer, setting.gpus) if cut else whole
            alike.setdefault((basis.D, basis.d, basis.K), basis)
        return list(alike.values())

    def parameters_of_a_rank(self, layer: Layer, gpus: int) -> float:
        part = self.part(layer, gpus)
        return part.K + part.n * part.d

    def bases(self, setting: Setting, cut: bool) -> float:
        return sum(packed_bytes(basis) for basis in self.held(setting, cut))

    def kept(self, layer: Layer, setting: Setting) -> float:
        return 0.0

    def extra_per_step(self, layer: Layer, setting: Setting) -> float:
        """Lambda's gradient, and gamma's where the D side is cut, summed once."""
        part, whole = self.part(layer, setting.gpus), self.basis(layer)
        numbers = whole.K + (whole.n * whole.d if part.d == whole.d else 0)
        return setting.all_reduce(SINGLE * numbers)

    def saved(self, setting: Setting) -> float:
        return SINGLE * setting.total(self.parameters)


def packed_bytes(basis: TernaryBasis) -> float:
    """What `basis.packed()` will hold, with the expected number of non-zeros (docs/formats.md)."""
    position = 4 if max(basis.D, basis.d, basis.K) > 65536 else 2
    a_side = 8 * (2 * basis.r + 1) + position * basis.density * basis.r * basis.d
    if basis.format == "planes":
        return a_side + 16 * basis.D * -(-basis.K // 64)
    if basis.format == "balanced":
        entry = position + 4 * -(-basis.n // 32)
        return a_side + 8 * (basis.r + 1) + basis.density * basis.r * basis.D * entry
    offsets = 8 * (2 * basis.D + 1) + 8 * (2 * basis.K + 1)
    return a_side + offsets + 2 * position * basis.density * basis.D * basis.K

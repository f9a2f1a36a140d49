"""Memory, communication and file sizes of LoRA, PEFT's RandLoRA and ours on several GPUs.

    python benchmarks/budget.py
    python benchmarks/budget.py --gpus 4 --tokens 8192 --rank 32 --hidden 4096 ...

Arithmetic on the shapes of a Llama-like model, no measurement. docs/benchmarks.md shows the output
and says what is counted.
"""

import argparse
from dataclasses import dataclass

HALF, SINGLE = 2, 4  # bytes of bfloat16 and float32
TRAINED = 4 * SINGLE  # a parameter, its gradient and Adam's two moments


@dataclass(frozen=True)
class Layer:
    """One linear layer of every block."""

    n_in: int
    n_out: int

    def sizes(self, r: int) -> tuple[int, int, int]:
        """(D, d, K) of the bases."""
        d, D = sorted((self.n_in, self.n_out))
        return D, d, -(-d // r) * r


@dataclass(frozen=True)
class Setting:
    """A model and the machines that train it."""

    layers: tuple[Layer, ...]
    blocks: int
    others: int  # parameters outside these layers: embeddings, head, norms
    gpus: int
    tokens: int  # per step and GPU

    def total(self, of_layer) -> float:
        return self.blocks * sum(of_layer(layer) for layer in self.layers)

    @property
    def weights(self) -> float:
        return self.total(lambda layer: layer.n_in * layer.n_out) + self.others

    def gather(self, size: float) -> float:
        """Bytes that each GPU sends in an all-gather or a reduce-scatter of `size` bytes in all."""
        return (self.gpus - 1) / self.gpus * size


@dataclass(frozen=True)
class Costs:
    """What one method needs: numbers trained, and bytes."""

    name: str
    trained: float
    bases: float
    kept: float  # for backward, beside the layers' inputs
    checkpoint: float
    buffers: float = 0.0  # which DDP broadcasts


def lora(setting: Setting, r: int) -> Costs:
    numbers = setting.total(lambda layer: r * (layer.n_in + layer.n_out))
    kept = setting.total(lambda _: SINGLE * setting.tokens * r)  # x A^T (T, r)
    return Costs(f"LoRA, r = {r}", numbers, 0, kept, SINGLE * numbers)


def diagonals(layer: Layer, r: int) -> int:
    """Numbers of lambda (r, n) and gamma (n, d)."""
    _, d, K = layer.sizes(r)
    return K + K // r * d


def stock(setting: Setting, r: int) -> Costs:
    """PEFT: one dense float32 A and B for all layers, and A' (K, d) kept by every layer."""
    widest = max(x.n_in for x in setting.layers), max(x.n_out for x in setting.layers)
    D, d, K = Layer(*widest).sizes(r)
    bases = SINGLE * (r * d + D * K)

    def kept(layer: Layer) -> float:
        _, d, K = layer.sizes(r)
        expands = layer.n_in <= layer.n_out
        return SINGLE * (K * d + (0 if expands else setting.tokens * K))

    numbers = setting.total(lambda layer: diagonals(layer, r))
    copies = 1 + setting.blocks * len(setting.layers)  # one for the model and one for every layer
    return Costs(
        f"PEFT RandLoRA, r = {r}",
        trained=numbers,
        bases=bases,
        kept=setting.total(kept),
        checkpoint=SINGLE * numbers + copies * bases,
        buffers=bases,
    )


def ours(setting: Setting, r: int, density: float | None, label: str) -> Costs:
    """One basis for each shape: packed independent ones, or Hadamard ones, which have no density.

    The latter's signs are float32.
    """
    shapes = {layer.sizes(r) for layer in setting.layers}
    bases = sum(
        SINGLE * sum(shape) if density is None else packed_bytes(*shape, r, density)
        for shape in shapes
    )
    numbers = setting.total(lambda layer: diagonals(layer, r))
    return Costs(f"ours, r = {r}, {label}", numbers, bases, 0, SINGLE * numbers)


def packed_bytes(D: int, d: int, K: int, r: int, density: float) -> float:
    """A packed basis with the expected number of non-zeros (docs/formats.md)."""
    a_side = 8 * (2 * r + 1) + 2 * density * r * d
    if density > 1 / 8 or max(D, K) > 65536:
        return a_side + 16 * D * -(-K // 64)
    return a_side + 8 * (2 * D + 2 * K + 2) + 4 * density * D * K


# ---- the tables ------------------------------------------------------------------------------


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}" if size else "0"
        size /= 1000
    return f"{size:,.3g} TB"


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def report(setting: Setting, methods: list[Costs]) -> str:
    memory, sent = [], []
    for m in methods:
        sizes = [TRAINED * m.trained / setting.gpus, m.bases, m.kept, m.checkpoint]
        memory.append([m.name, f"{m.trained / 1e6:,.0f} M", *map(size_text, sizes)])
        # FSDP2 gathers the adapter for forward and for backward, and scatters its gradient.
        gradients = SINGLE * m.trained
        sizes = [setting.gather(2 * gradients), m.buffers, setting.gather(3 * gradients)]
        sent.append([m.name, *map(size_text, sizes)])
    base = HALF * setting.weights
    return "\n\n".join((
        f"{setting.weights / 1e9:.1f} G parameters in bfloat16 on {setting.gpus} GPUs "
        f"({size_text(base / setting.gpus)} each), {setting.tokens} tokens a step and GPU.\n"
        f"The base layers alone send {size_text(setting.gather(2 * base))} under FSDP2 in a step "
        "and GPU.",
        table(
            "FSDP2, bytes on a GPU | trained | adapter, gradient, Adam | bases | "
            "kept for backward beside x | checkpoint",
            memory,
        ),
        table(
            "sent by a GPU in a step | DDP: gradients | DDP: buffers | FSDP2: adapter",
            sent,
        ),
    ))  # fmt: skip


def llama(args: argparse.Namespace) -> Setting:
    hidden, kv, inner = args.hidden, args.kv, args.intermediate
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    others = 2 * args.vocabulary * hidden + (2 * args.blocks + 1) * hidden
    layers = tuple(Layer(*shape) for shape in shapes)
    return Setting(layers, args.blocks, others, args.gpus, args.tokens)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, meaning in (
        ("gpus", 8, "number of GPUs"),
        ("tokens", 4096, "tokens of a step and GPU"),
        ("rank", 64, "r of RandLoRA"),
        ("lora-rank", 32, "r of LoRA"),
        ("hidden", 8192, "the model's width"),
        ("intermediate", 28672, "width inside the MLP"),
        ("kv", 1024, "outputs of k_proj and v_proj"),
        ("blocks", 80, "transformer blocks"),
        ("vocabulary", 128256, "size of the vocabulary"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    args = parser.parse_args(arguments)
    setting, r, very = llama(args), args.rank, args.hidden**-0.5
    densities = {"Hadamard": None, "density 1/3": 1 / 3, "density 0.07": 0.07}
    densities[f"very_sparse ({very:.4f})"] = very
    methods = [lora(setting, args.lora_rank), stock(setting, r)]
    methods += [ours(setting, r, density, label) for label, density in densities.items()]
    print(report(setting, methods))


if __name__ == "__main__":
    main()

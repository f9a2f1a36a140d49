"""Memory, communication and file sizes of LoRA, PEFT's RandLoRA and ours on several GPUs.

    python benchmarks/budget.py
    python benchmarks/budget.py --gpus 4 --tokens 8192 --rank 32 --hidden 4096 ...

Arithmetic on the shapes of a Llama-like model, no measurement. docs/distributed.md shows the output
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
    columns: bool  # tensor parallelism cuts it by outputs

    @property
    def expands(self) -> bool:
        return self.n_in <= self.n_out

    def sizes(self, r: int, gpus: int = 1) -> tuple[int, int, int]:
        """(D, d, K) of the bases, or of the slice that a tensor-parallel rank holds."""
        d, D = sorted((self.n_in, self.n_out))
        K = -(-d // r) * r
        d_is_cut = self.columns != self.expands
        return (D, d // gpus, K) if d_is_cut else (D // gpus, d, K)


@dataclass(frozen=True)
class Setting:
    """A model and the machines that train it."""

    layers: tuple[Layer, ...]
    blocks: int
    others: int  # parameters outside these layers: embeddings, head, norms
    gpus: int
    tokens: int  # per step and GPU; under tensor parallelism per step
    hidden: int

    def total(self, of_layer) -> float:
        return self.blocks * sum(of_layer(layer) for layer in self.layers)

    @property
    def weights(self) -> float:
        return self.total(lambda layer: layer.n_in * layer.n_out) + self.others

    def all_reduce(self, size: float) -> float:
        """Bytes that each GPU sends in a ring."""
        return 2 * self.gather(size)

    def gather(self, size: float) -> float:
        """The same for an all-gather or a reduce-scatter of `size` bytes in all."""
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
    # On a rank under tensor parallelism; None: not supported.
    rank_trained: float | None = None
    rank_bases: float = 0.0
    rank_dense_b: float = 0.0
    rank_sent: float = 0.0


def lora(setting: Setting, r: int) -> Costs:
    def trained(layer: Layer, gpus: int = 1) -> float:
        cut, whole = layer.n_in, layer.n_out  # one of its two matrices is cut with the layer
        if layer.columns:
            cut, whole = whole, cut
        return r * (whole + cut / gpus)

    numbers = setting.total(trained)
    activation = SINGLE * setting.tokens * r  # x A^T (T, r)
    return Costs(
        f"LoRA, r = {r}",
        trained=numbers,
        bases=0,
        kept=setting.total(lambda _: activation),
        checkpoint=SINGLE * numbers,
        rank_trained=setting.total(lambda layer: trained(layer, setting.gpus)),
        # As PEFT over Megatron's layers: x A^T summed in forward, or its gradient in backward.
        rank_sent=setting.total(lambda _: setting.all_reduce(activation)),
    )


def diagonals(layer: Layer, r: int, gpus: int = 1) -> int:
    """Numbers of lambda (r, n) and gamma (n, d)."""
    _, d, K = layer.sizes(r, gpus)
    return K + K // r * d


def stock(setting: Setting, r: int) -> Costs:
    """PEFT: one dense float32 A and B for all layers, and A' (K, d) kept by every layer."""
    widest = max(x.n_in for x in setting.layers), max(x.n_out for x in setting.layers)
    D, d, K = Layer(*widest, True).sizes(r)
    bases = SINGLE * (r * d + D * K)

    def kept(layer: Layer) -> float:
        _, d, K = layer.sizes(r)
        return SINGLE * (K * d + (0 if layer.expands else setting.tokens * K))

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

    The latter's signs are a byte each, and no product makes B dense.
    """

    def packed(gpus: int) -> float:
        shapes = {layer.sizes(r, gpus) for layer in setting.layers}
        if density is None:
            return sum(map(sum, shapes))
        return sum(packed_bytes(*sizes, r, density) for sizes in shapes)

    def sent(layer: Layer) -> float:
        """Lambda's gradient, and gamma's if the D side is cut, summed once."""
        d_is_cut = layer.columns != layer.expands
        numbers = layer.sizes(r)[2] if d_is_cut else diagonals(layer, r)
        return setting.all_reduce(SINGLE * numbers)

    numbers = setting.total(lambda layer: diagonals(layer, r))
    shapes = {layer.sizes(r, setting.gpus) for layer in setting.layers}
    return Costs(
        f"ours, r = {r}, {label}",
        trained=numbers,
        bases=packed(1),
        kept=0,
        checkpoint=SINGLE * numbers,
        rank_trained=setting.total(lambda layer: diagonals(layer, r, setting.gpus)),
        rank_bases=packed(setting.gpus),
        rank_dense_b=0 if density is None else sum(HALF * D * K for D, _, K in shapes),
        rank_sent=setting.total(sent),
    )


def packed_bytes(D: int, d: int, K: int, r: int, density: float) -> float:
    """A packed basis with the expected number of non-zeros (docs/formats.md)."""
    position = 4 if max(D, d, K) > 65536 else 2
    a_side = 8 * (2 * r + 1) + position * density * r * d
    if density > 1 / 8:
        return a_side + 16 * D * -(-K // 64)
    return a_side + 8 * (2 * D + 2 * K + 2) + 2 * position * density * D * K


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
    half_step = HALF * setting.tokens * setting.hidden
    frozen = setting.blocks * setting.all_reduce(4 * half_step)  # under tensor parallelism
    memory, rank, sent = [], [], []
    for m in methods:
        held = [m.bases, m.kept, m.checkpoint]
        sizes = [TRAINED * m.trained / setting.gpus, *held]
        memory.append([m.name, f"{m.trained / 1e6:,.0f} M", *map(size_text, sizes)])
        extra = "not supported"
        if m.rank_trained is not None:
            sizes = [TRAINED * m.rank_trained, m.rank_bases, m.rank_dense_b]
            rank.append([m.name, *map(size_text, sizes)])
            extra = f"{size_text(m.rank_sent)} ({100 * m.rank_sent / frozen:.1f}%)"
        # FSDP2 gathers the adapter for forward and for backward, and scatters its gradient.
        gradients = SINGLE * m.trained
        sizes = [setting.all_reduce(gradients), m.buffers, setting.gather(3 * gradients)]
        sent.append([m.name, *map(size_text, sizes), extra])
    base = HALF * setting.weights
    return "\n\n".join((
        f"{setting.weights / 1e9:.1f} G parameters in bfloat16 on {setting.gpus} GPUs "
        f"({size_text(base / setting.gpus)} each), {setting.tokens} tokens a step (tensor "
        "parallel) or a step and GPU (else).\n"
        f"The base layers alone send {size_text(setting.gather(2 * base))} under FSDP2 and "
        f"{size_text(frozen)} under tensor parallelism in a step and GPU.",
        table(
            "FSDP2, bytes on a GPU | trained | adapter, gradient, Adam | bases | "
            "kept for backward beside x | checkpoint",
            memory,
        ),
        table(
            "tensor parallel, bytes on a GPU | adapter, gradient, Adam | bases | "
            "dense B, where B is a GEMM",
            rank,
        ),
        table(
            "sent by a GPU in a step | DDP: gradients | DDP: buffers | FSDP2: adapter | "
            "tensor parallel: adapter (share of the base's)",
            sent,
        ),
    ))  # fmt: skip


def llama(args: argparse.Namespace) -> Setting:
    hidden, kv, inner = args.hidden, args.kv, args.intermediate
    by_outputs = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, inner), (hidden, inner))
    by_inputs = ((hidden, hidden), (inner, hidden))
    layers = [Layer(*s, True) for s in by_outputs] + [Layer(*s, False) for s in by_inputs]
    others = 2 * args.vocabulary * hidden + (2 * args.blocks + 1) * hidden
    return Setting(tuple(layers), args.blocks, others, args.gpus, args.tokens, hidden)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, meaning in (
        ("gpus", 8, "number of GPUs"),
        ("tokens", 4096, "tokens of a step (tensor parallel), of a step and GPU (else)"),
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

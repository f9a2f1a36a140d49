"""How well RandLoRA and LoRA approximate a given full-rank update, by number of parameters.

    python benchmarks/approximate.py --out benchmarks/results/approximate      random targets
    python benchmarks/approximate.py --real 60 --out ...     and real ones: 60 steps of full tuning

The motivation of the paper (section 3) as a table for choosing a density: lambda and gamma are
fitted to a target matrix by Adam, with bases of several ranks and kinds, and the relative
error ||target - dW|| / ||target|| is put beside that of the best LoRA of as many parameters, which
is the truncated singular value decomposition. A real target is what full fine-tuning on the
task of examples/spelling.py changes in a layer of SmolLM2-135M.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from methods import basis_of
from record import write
from tqdm import tqdm

from randlora_ext import delta_weight
from randlora_ext.reference import delta_weight_reference

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # spelling.py

BASES = ["dense", "1/3", "1/8", "0.07", "1/16", "very_sparse", "hadamard"]


def random_targets(size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Square targets: Gaussian, and with singular values that fall as k^-1/2 and as 1/k."""

    def orthogonal():
        return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]

    k = torch.arange(1, size + 1)
    targets = {"gaussian": torch.randn(size, size, generator=generator)}
    for name, power in (("spectrum k^-1/2", 0.5), ("spectrum 1/k", 1.0)):
        targets[name] = orthogonal() * k.pow(-power) @ orthogonal()
    return targets


def real_targets(steps: int) -> dict[str, torch.Tensor]:
    """What full fine-tuning changes in one attention and one MLP layer of SmolLM2-135M."""
    from spelling import load_model, plan_batches, read_words, train

    tokenizer, model = load_model()
    layers = {"q_proj": "model.layers.15.self_attn.q_proj", "down": "model.layers.15.mlp.down_proj"}
    before = {k: model.get_submodule(name).weight.detach().clone() for k, name in layers.items()}
    training, _ = read_words()
    list(train(model, tokenizer, plan_batches(training, steps, 16, 0), 1e-4))
    return {
        f"SmolLM2 {k}": model.get_submodule(name).weight.detach() - before[k]
        for k, name in layers.items()
    }


def lora_error(target: torch.Tensor, parameters: int) -> float:
    """The error of the best matrix of at most `parameters`; linear between whole ranks."""
    energy = torch.linalg.svdvals(target).double().square()
    rest = 1 - torch.cat([torch.zeros(1), energy.cumsum(0)]) / energy.sum()
    rank = min(parameters / sum(target.shape), len(energy))
    low = min(int(rank), len(energy) - 1)
    return math.sqrt(max(float(torch.lerp(rest[low], rest[low + 1], rank - low)), 0.0))


def update_of(
    bases: str, shape: tuple[int, int], r: int, seed: int
) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], int, int]:
    """dW as a function of lambda (r, n) and gamma (n, d), and n and d."""
    out_features, in_features = shape
    d, D = min(shape), max(shape)
    n = -(-d // r)
    if bases == "dense":  # the paper's Gaussian ones, in plain PyTorch
        make = torch.Generator().manual_seed(seed)
        A, B = torch.randn(r, d, generator=make), torch.randn(D, r * n, generator=make)
        return lambda lam, gam: delta_weight_reference(A, B, lam, gam, 1.0, *shape), n, d
    basis = basis_of(bases, (in_features, out_features), r, seed)
    return lambda lam, gam: delta_weight(basis, lam, gam), n, d


def randlora_error(
    target: torch.Tensor, r: int, bases: str, steps: int, seed: int
) -> tuple[float, int]:
    """(relative error, parameters) after fitting lambda and gamma with Adam, lr falling to zero."""
    target = target / target.norm()
    update, n, d = update_of(bases, (target.shape[0], target.shape[1]), r, seed)
    # Started where dW has about the size of the target, so that one learning rate serves all.
    torch.manual_seed(seed)
    lam = torch.randn(r, n).requires_grad_()
    gam = torch.randn(n, d).requires_grad_()
    with torch.no_grad():
        size = update(lam, gam).norm()
        lam *= size**-0.5 * 0.5
        gam *= size**-0.5 * 0.5
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": 0.05 * float(p.detach().std())} for p in (lam, gam)]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (update(lam, gam) - target).square().sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    error = (update(lam, gam) - target).norm().item()
    return error, lam.numel() + gam.numel()


def run(
    targets: dict[str, torch.Tensor], ranks: list[int], bases: list[str], steps: int, seeds: int
) -> list[dict]:
    cases = [(t, r, b) for t in targets for r in ranks for b in bases]
    rows = []
    for name, r, bases in tqdm(cases, unit="fit"):
        target = targets[name]
        errors = []
        for seed in range(seeds):
            error, parameters = randlora_error(target, r, bases, steps, seed)
            errors.append(error)
        rows.append(
            {
                "target": name,
                "shape": "x".join(map(str, target.shape)),
                "r": r,
                "bases": bases,
                "parameters": parameters,
                "share": parameters / target.numel(),
                "randlora": sum(errors) / seeds,
                "spread": max(errors) - min(errors),
                "lora": lora_error(target, parameters),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="of the random targets")
    parser.add_argument("--ranks", default="4,8,16,32", help="r of RandLoRA, comma separated")
    parser.add_argument("--bases", default=",".join(BASES), help="a density, or dense")
    parser.add_argument("--steps", type=int, default=400, help="of Adam for each fit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--real", type=int, metavar="N", help="add a real target: N training steps")
    parser.add_argument("--out", type=Path, help="write FILE.json")
    args = parser.parse_args(arguments)

    targets = random_targets(args.size, torch.Generator().manual_seed(0))
    if args.real:
        targets |= real_targets(args.real)
    ranks = [int(r) for r in args.ranks.split(",")]
    rows = run(targets, ranks, args.bases.split(","), args.steps, args.seeds)
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        print("  ".join(f"{c:>16}" for c in cells))
    if args.out:
        write(args.out, rows, steps=args.steps, seeds=args.seeds, tuning_steps=args.real)


if __name__ == "__main__":
    main()

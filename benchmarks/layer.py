"""One layer, forward and backward: frozen, LoRA, PEFT's RandLoRA and ours, in one process.

    python benchmarks/layer.py                       the table of README (about five minutes)
    python benchmarks/layer.py --quick               a smaller grid
    python benchmarks/layer.py --paths               our three paths side by side

Every method is first verified against the fp64 reference, then timed in turn (frozen, LoRA, PEFT,
ours, frozen, ...), so that drift of the machine hits all of them. Figures are medians; ratios are
over the frozen layer's median of the same row. x requires a gradient, as inside a model.
"""

import argparse
import csv
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import peft
import torch
from torch import nn

import randlora_ext
from randlora_ext import TernaryBasis, explain
from randlora_ext.functional import linear
from randlora_ext.reference import linear_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def density_of(text: str, d: int) -> float:
    """A number, a fraction, or PEFT's very_sparse (1 / sqrt(d))."""
    if text == "very_sparse":
        return 1 / math.sqrt(d)
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


class Ours(nn.Module):
    """The fused operator on a frozen layer; the benchmark fixes the path where asked to."""

    def __init__(self, base: nn.Linear, basis: TernaryBasis, scaling: float, path: str = "auto"):
        super().__init__()
        self.base, self.basis, self.scaling, self.path = base, basis, scaling, path
        self.lam = nn.Parameter(torch.randn(basis.r, basis.n) * 0.1)
        self.gam = nn.Parameter(torch.full((basis.n, basis.d), 1 / max(basis.n, basis.d)))

    def forward(self, x):
        w, b = self.base.weight, self.base.bias
        return linear(x, w, b, self.basis, self.lam, self.gam, self.scaling, self.path)


def wrapped(base: nn.Linear, config: peft.PeftConfig) -> nn.Module:
    """`base` as the only layer of a PEFT model, its adapter away from zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.Sequential(nn.Linear(1, 1), base), config)
    layer = model.base_model.model[1]
    for name, parameter in layer.named_parameters():
        if "lora_B" in name or "randlora_lambda" in name:
            nn.init.normal_(parameter, std=0.1)
    return layer


def step(layer: nn.Module, leaves: list, x: torch.Tensor, dy: torch.Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    layer(x).backward(dy)


def verify(ours: Ours, x: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest relative error of the output and of the gradients against the fp64 reference."""
    A, B = ours.basis.dense(dtype=torch.float64)
    lam, gam = (p.detach().double().requires_grad_() for p in (ours.lam, ours.gam))
    x64 = x.detach()[:64].double().requires_grad_()
    want = linear_reference(x64, ours.base.weight.double(), ours.base.bias.double(), A, B, lam, gam,
                            ours.scaling)  # fmt: skip
    x1 = x.detach()[:64].clone().requires_grad_()
    got = ours(x1)
    dy = torch.randn_like(got)
    want_grads = torch.autograd.grad(want, [x64, lam, gam], dy.double())
    got_grads = torch.autograd.grad(got, [x1, ours.lam, ours.gam], dy)
    pairs = zip([got, *got_grads], [want, *want_grads], strict=True)
    error = max(float((g.detach().double() - w.detach()).norm() / w.detach().norm())
                for g, w in pairs)  # fmt: skip
    limit = 1e-4 if dtype is torch.float32 else 3e-2
    if not error < limit:
        sys.exit(f"verification failed: relative error {error:.2e}, limit {limit:.0e}")
    return error


def row(size: tuple[int, int], tokens: int, density: str, args) -> dict:
    """Times every method for one layer size, token count and density."""
    torch.manual_seed(0)
    n_in, n_out = size
    dtype = DTYPES[args.dtype]
    value = density_of(density, min(size))
    base = nn.Linear(n_in, n_out).to(dtype).requires_grad_(False)
    basis = TernaryBasis(n_in, n_out, args.rank, value)
    scaling = 20.0
    methods: dict[str, nn.Module] = {"frozen": base}

    def fresh():
        new = nn.Linear(n_in, n_out).to(dtype).requires_grad_(False)
        new.load_state_dict(base.state_dict())
        return new

    if args.paths:
        skip = {"merged"} if dtype is not torch.float32 else set()
        for path in ("factored", "delta", "merged"):
            if path not in skip:
                methods[path] = Ours(base, basis, scaling, path)
    else:
        methods["lora"] = wrapped(fresh(), peft.LoraConfig(r=args.rank, target_modules=["1"]))
        sparse = {"1/3": {"sparse": True}, "very_sparse": {"very_sparse": True}}.get(density)
        # PEFT's cost does not depend on the density: its bases are dense. It has no 0.07.
        config = peft.RandLoraConfig(r=args.rank, target_modules=["1"], save_projection=False,
                                     **(sparse or {"sparse": True}))  # fmt: skip
        methods["peft"] = wrapped(fresh(), config)
        methods["ours"] = Ours(base, basis, scaling)

    x = torch.randn(tokens, n_in, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, n_out, dtype=dtype)
    verified = next(m for m in reversed(methods.values()) if isinstance(m, Ours))
    error = verify(verified, x, dtype)

    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(args.repeats + 2):
        for name, layer in methods.items():
            # Enough calls that the caches are those of this method, not of the one before.
            calls = max(1, int(1e9 / (tokens * n_in * n_out + 1e6)))
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            start = time.perf_counter()
            for _ in range(calls):
                step(layer, leaves, x, dy)
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) / calls)
    medians = {name: statistics.median(t) for name, t in times.items()}
    result = {"in": n_in, "out": n_out, "tokens": tokens, "density": density, "dtype": args.dtype,
              "path": explain(basis, tokens, dtype).path, "error": error,
              "frozen_ms": medians["frozen"] * 1e3}  # fmt: skip
    for name, median in medians.items():
        if name != "frozen":
            result[name] = median / medians["frozen"]
    return result


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        **randlora_ext.build_info(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024x1024,2048x2048", help="in x out, comma separated")
    parser.add_argument("--tokens", default="16,256,1024")
    parser.add_argument("--densities", default="1/3,0.07,very_sparse")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one size, two token counts")
    parser.add_argument("--paths", action="store_true", help="our paths instead of other methods")
    parser.add_argument("--out", type=Path, help="write FILE.csv and FILE.json")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.tokens, args.repeats = "1024x1024", "16,256", 5

    print(json.dumps(machine()))
    sizes = [tuple(int(n) for n in s.split("x")) for s in args.sizes.split(",")]
    rows = []
    for size in sizes:
        for tokens in (int(t) for t in args.tokens.split(",")):
            for density in args.densities.split(","):
                r = row(size, tokens, density, args)
                if not rows:
                    print("  ".join(f"{k:>11}" for k in r))
                rows.append(r)
                print("  ".join(f"{v:>11.3g}" if isinstance(v, float) else f"{v!s:>11}"
                                for v in r.values()), flush=True)  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
        )
        with args.out.with_suffix(".csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

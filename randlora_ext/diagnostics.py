"""What a bug report needs, and a self-check against the plain PyTorch reference."""

import hashlib
import importlib.metadata
import os
import platform
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import build_info
from .basis import TernaryBasis
from .basis.dense import DenseMatrices
from .basis.description import SPECIFICATIONS
from .basis.ternary import generate_planes
from .devices import cuda_available
from .ops.functional import delta_weight, linear, merged_weight
from .reference import delta_weight_reference, linear_reference

# Variables with these prefixes, ours and torch's, change what runs; misspelled ones show, too.
_OVERRIDES = ("RANDLORA_", "OMP_", "MKL_", "KMP_", "CUDA_", "PYTORCH_", "TORCH_", "LD_PRELOAD")
_PACKAGES = (
    "torch", "peft", "transformers", "accelerate", "bitsandbytes", "safetensors", "numpy",
)  # fmt: skip
# A slice of B (seed, role, row, rows, column, columns, density), and the SHA-256 of its planes
# that tests/data/basis_v1.txt has for it.
_SLICE = (11, 1, 0, 576, 0, 576, 0.07)
_DIGEST = "d0ab1e87028220f28b424b06ea873001782e923f6ac3a444a3048af672291547"
# in, out, r, density of independent bases: wide, tall, an overhanging last base; lists and planes.
_SHAPES = ((96, 160, 16, 0.07), (160, 96, 16, 1 / 3), (70, 70, 32, 0.3))
_KINDS = ("hadamard", "independent", "dense")
_TOKENS = (33, 300)  # of the second number dense bases form dW
# Relative error of outputs and gradients against float64.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check() -> int:
    """Prints the report and the self-check; returns 1 if a check fails or cannot run."""
    print("\n".join(describe()))
    print("self-check, relative error against the float64 reference (limit):")
    try:
        checks = self_check()
    except Exception:
        traceback.print_exc()
        print("verdict: FAILED, the check could not run")
        return 1
    wrong = [what for what, error, limit in checks if not error <= limit]
    for what, error, limit in checks:
        print(f"  {what:38} {error:8.1e} ({limit:.0e}){'  WRONG' if what in wrong else ''}")
    print(f"verdict: {'FAILED: ' + ', '.join(wrong) if wrong else 'all is well'}")
    return 1 if wrong else 0


def describe() -> list[str]:
    """Lines of versions, instruction sets, cards and overrides."""
    build = build_info()
    packages = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    set_here = sorted((k, v) for k, v in os.environ.items() if k.startswith(_OVERRIDES))
    overrides = ", ".join(f"{name}={value}" for name, value in set_here)
    return [
        f"randlora_ext {build['version']}, compiler {build['compiler']}, "
        f"basis specifications {', '.join(f'{k}-{v}' for k, v in SPECIFICATIONS.items())}",
        f"installed in {Path(__file__).parent}",
        f"python {sys.version.split()[0]} on {platform.platform()}, {_processor()}",
        f"packages: {packages}",
        f"CPU kernels: {build['isa']} of {', '.join(build['built_isas'])}; "
        f"{torch.get_num_threads()} threads",
        f"CUDA kernels: {build['cuda']}",
        f"cards: {_cards()} (torch's CUDA: {torch.version.cuda or 'none'})",
        f"environment: {overrides or 'no overrides'}",
    ]


def self_check() -> list[tuple[str, float, float]]:
    """(what, relative error, limit): bases, layers and merging in every dtype, on every device."""
    devices = [torch.device("cpu")]
    if cuda_available() and torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    checks = [(f"{device} generated basis", _wrong_basis(device), 0.0) for device in devices]
    for device in devices:
        for dtype, limit in LIMITS.items():
            for kind in _KINDS:
                name = f"{device} {str(dtype)[6:]} {kind}"
                bases = [*_bases(kind)]
                layer = max(
                    relative_error(basis, tokens, dtype, device)
                    for basis in bases
                    for tokens in _TOKENS
                )
                merged = max(_merge_error(basis, dtype, device) for basis in bases)
                checks += [(f"{name} layer", layer, limit), (f"{name} merge", merged, limit)]
    return checks


def _wrong_basis(device: torch.device) -> float:
    """1.0 if a generated slice differs in a bit from the specification's, else 0.0."""
    planes = generate_planes(*_SLICE, device).cpu()
    words = struct.pack(f"<{planes.numel()}q", *planes.flatten().tolist())
    return float(hashlib.sha256(words).hexdigest() != _DIGEST)


def _bases(kind: str) -> Iterator[TernaryBasis]:
    for n_in, n_out, r, density in _SHAPES:
        drawn = TernaryBasis(n_in, n_out, r, density, 1)
        if kind == "dense":
            yield TernaryBasis.from_dense(DenseMatrices(*drawn.dense()), n_in, n_out)
        else:
            yield TernaryBasis(n_in, n_out, r, seed=1, kind=kind) if kind == "hadamard" else drawn


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _error(mine: Tensor, true: Tensor) -> float:
    return float((mine.detach().cpu().double() - true).norm() / true.norm())


def _merge_error(basis: TernaryBasis, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of dW, its gradients, and W + dW against the reference in float64."""
    normal, sizes = _normal(basis.r), (basis.out_features, basis.in_features)
    W, grad = normal(*sizes).to(dtype), normal(*sizes)
    lam, gam = normal(basis.r, basis.n), normal(basis.n, basis.d) / basis.d
    leaves = lam.to(device).requires_grad_(), gam.to(device).requires_grad_()
    dW = delta_weight(basis, leaves[0], leaves[1])
    merged = merged_weight(basis, W.to(device), leaves[0], leaves[1])
    got = [merged, dW, *torch.autograd.grad(dW, leaves, grad.to(device))]

    wide = lam.double().requires_grad_(), gam.double().requires_grad_()
    A, B = basis.dense(dtype=torch.float64)
    want = delta_weight_reference(A, B, wide[0], wide[1], 1.0, sizes[0], sizes[1])
    of_want = torch.autograd.grad(want, wide, grad.double())
    want = want.detach()
    return max(map(_error, got, (W.double() + want, want, *of_want)))


def relative_error(
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Largest relative error of `linear` and its gradients against the reference in float64.

    Args:
        basis: of the layer; weight, diagonals, x and dy are random.
        tokens: rows of x.
        dtype: of x, dy and the weight.
        device: on which `linear` runs.

    Returns:
        The largest over y, dx, dlam and dgam of |difference| / |reference|, Frobenius norms.
    """
    normal = _normal(basis.r)
    n_in, n_out = basis.in_features, basis.out_features
    x, dy = normal(tokens, n_in).to(dtype), normal(tokens, n_out).to(dtype)
    W = (normal(n_out, n_in) / n_in**0.5).to(dtype)
    lam, gam = normal(basis.r, basis.n), normal(basis.n, basis.d) / basis.d
    leaves = [t.to(device).requires_grad_() for t in (x, lam, gam)]
    y = linear(leaves[0], W.to(device), None, basis, leaves[1], leaves[2])
    got = [y, *torch.autograd.grad(y, leaves, dy.to(device))]

    wide = [t.double().requires_grad_() for t in (x, lam, gam)]
    A, B = basis.dense(dtype=torch.float64)
    want_y = linear_reference(wide[0], W.double(), None, A, B, wide[1], wide[2], 1.0)
    want = [want_y, *torch.autograd.grad(want_y, wide, dy.double())]
    return max(map(_error, got, (t.detach() for t in want)))


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with its build, as "+cu130", which the metadata may lack
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line[:10] == "model name"]
        if names:
            return f"{len(names)} x {names[0]}"
    return platform.processor() or platform.machine()


def _cards() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    cards = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{c.name} (sm_{c.major}{c.minor}, {c.total_memory >> 30} GiB)" for c in cards)

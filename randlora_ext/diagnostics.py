"""What a bug report needs, and a self-check against the plain PyTorch reference."""

import importlib.metadata
import os
import platform
import sys

import torch

from . import build_info, cuda
from .basis import TernaryBasis
from .functional import linear
from .reference import linear_reference

OVERRIDES = (
    "RANDLORA_ISA",
    "RANDLORA_PATH",
    "RANDLORA_B_SIDE",
    "RANDLORA_TF32",
    "RANDLORA_CUDA_LIBRARY",
    "RANDLORA_CUDA_SERVES_CPU",
    "OMP_NUM_THREADS",
)
_PACKAGES = ("torch", "peft", "transformers", "bitsandbytes", "safetensors")
# in, out, r, density: wide, tall, an overhanging last base; lists and planes.
_SHAPES = ((96, 160, 16, 0.07), (160, 96, 16, 1 / 3), (70, 70, 32, 0.3))
_TOKENS = 33
# Relative error of outputs and gradients against float64.
_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def describe() -> list[str]:
    """Lines of versions, instruction sets, cards and overrides."""
    build = build_info()
    packages = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    overrides = ", ".join(f"{k}={os.environ[k]}" for k in OVERRIDES if k in os.environ)
    return [
        f"randlora_ext {build['version']}, compiler {build['compiler']}, "
        f"basis specification {build['spec_version']}",
        f"python {sys.version.split()[0]} on {platform.platform()}, {_processor()}",
        f"packages: {packages}",
        f"CPU kernels: {build['isa']} of {', '.join(build['built_isas'])}; "
        f"{torch.get_num_threads()} threads",
        f"CUDA kernels: {build['cuda']}",
        f"cards: {_cards()}",
        f"environment: {overrides or 'no overrides'}",
    ]


def self_check() -> list[tuple[str, float, float]]:
    """(what, relative error, limit) of the operator on every device and dtype that it serves."""
    devices = [torch.device("cpu")]
    if cuda.available() and torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [
        (f"{device} {str(dtype)[6:]} {path}", _error(device, dtype, path), limit)
        for device in devices
        for dtype, limit in _LIMITS.items()
        for path in ("factored", "delta")
    ]


def _error(device: torch.device, dtype: torch.dtype, path: str) -> float:
    """The largest over shapes, output and gradients, against the reference in float64."""
    worst = 0.0
    for n_in, n_out, r, density in _SHAPES:
        generator = torch.Generator().manual_seed(r)
        basis = TernaryBasis(n_in, n_out, r, density, seed=1)

        def normal(*shape, generator=generator):
            return torch.randn(shape, generator=generator)

        x, dy = normal(_TOKENS, n_in).to(dtype), normal(_TOKENS, n_out).to(dtype)
        W = (normal(n_out, n_in) / n_in**0.5).to(dtype)
        lam, gam = normal(basis.r, basis.n), normal(basis.n, basis.d) / basis.d
        leaves = [t.to(device).requires_grad_() for t in (x, lam, gam)]
        y = linear(leaves[0], W.to(device), None, basis, *leaves[1:], 1.0, path)
        got = [y, *torch.autograd.grad(y, leaves, dy.to(device))]

        wide = [t.double().requires_grad_() for t in (x, lam, gam)]
        A, B = basis.dense(dtype=torch.float64)
        want_y = linear_reference(wide[0], W.double(), None, A, B, *wide[1:], 1.0)
        want = [want_y, *torch.autograd.grad(want_y, wide, dy.double())]
        for mine, true in zip(got, want, strict=True):
            difference = (mine.detach().cpu().double() - true.detach()).norm()
            worst = max(worst, float(difference / true.detach().norm()))
    return worst


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

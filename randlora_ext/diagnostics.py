"""What a bug report needs, and a self-check against the plain PyTorch reference."""

import hashlib
import itertools
import math
import os
import platform
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.autograd import grad

from . import _C, build_info
from .basis import Basis
from .basis.description import SPECIFICATIONS
from .basis.ternary import generate_planes
from .devices import has_cuda_kernels
from .ops.functional import delta_weight, linear
from .reference import delta_weight_reference, linear_reference

# Variables with these prefixes, ours and torch's, change what runs; misspelled ones show, too.
_OVERRIDES = ("RANDLORA_", "OMP_", "MKL_", "KMP_", "CUDA_", "PYTORCH_", "TORCH_", "LD_PRELOAD")
_PACKAGES = "peft", "transformers", "accelerate", "bitsandbytes", "safetensors", "numpy"
# The first of B (seed, role, rows, columns, threshold), and the SHA-256 of its planes
# that tests/data/basis_v1.txt has for it.
_SLICE = (11, 1, 576, 576, _C.threshold(0.07))
_DIGEST = "d0ab1e87028220f28b424b06ea873001782e923f6ac3a444a3048af672291547"
# in, out, r, density of independent bases: wide, tall, an overhanging last base; lists and planes.
_SHAPES = ((96, 160, 16, 0.07), (160, 96, 16, 1 / 3), (70, 70, 32, 0.3))
_TOKENS = (33, 300)  # of the second number dense bases form dW
# Relative error of outputs and gradients against float64.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check() -> int:
    """Prints the report and the self-check; returns 1 if a check fails."""
    print("\n".join(describe()))
    print("self-check, relative error against the float64 reference (limit):")
    checks = self_check()
    wrong = [what for what, error, limit in checks if not error <= limit]
    for what, error, limit in checks:
        print(f"  {what:38} {error:8.1e} ({limit:.0e}){'  WRONG' if what in wrong else ''}")
    print(f"verdict: {'FAILED: ' + ', '.join(wrong) if wrong else 'all is well'}")
    return 1 if wrong else 0


def describe() -> list[str]:
    """Lines of versions, instruction sets, cards and overrides."""
    build = build_info()
    packages = [f"torch {torch.__version__}"]
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    overrides = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_OVERRIDES))
    return [
        f"randlora_ext {build['version']}, compiler {build['compiler']}, "
        f"basis specifications {', '.join(f'{k}-{v}' for k, v in SPECIFICATIONS.items())}",
        f"installed in {Path(__file__).parent}",
        f"python {sys.version.split()[0]} on {platform.platform()}, {_processor()}",
        f"packages: {', '.join(packages)}",
        f"CPU kernels: {build['isa']} of {', '.join(build['built_isas'])}; "
        f"{torch.get_num_threads()} threads",
        f"CUDA kernels: {build['cuda']}",
        f"cards: {_cards()} (torch's CUDA: {torch.version.cuda or 'none'})",
        f"environment: {', '.join(overrides) or 'no overrides'}",
    ]


def self_check() -> list[tuple[str, float, float]]:
    """(what, relative error, limit): bases, layers and merging in every dtype, on every device."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        torch.cuda.init()  # or no card could be asked
        cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        devices += [card for card in cards if has_cuda_kernels(card)]
    checks = [(f"{device} generated basis", _wrong_basis(device), 0.0) for device in devices]
    drawn = [Basis(*shape, seed=1) for shape in _SHAPES]
    kinds = {
        "hadamard": [Basis(n_in, n_out, r, seed=1) for n_in, n_out, r, _ in _SHAPES],
        "independent": drawn,
        "dense": [Basis.from_dense(*b.dense(), b.in_features, b.out_features) for b in drawn],
    }
    for device, (dtype, limit), kind in itertools.product(devices, LIMITS.items(), kinds):
        cases = itertools.product(kinds[kind], _TOKENS)
        errors = [relative_error(basis, tokens, dtype, device) for basis, tokens in cases]
        checks.append((f"{device} {str(dtype)[6:]} {kind}", _largest(errors), limit))
    return checks


def _wrong_basis(device: torch.device) -> float:
    """1.0 if a generated slice differs in a bit from the specification's, else 0.0."""
    planes = generate_planes(*_SLICE, device).cpu()
    drawn = bytes(planes.view(torch.uint8).flatten().tolist())
    return float(hashlib.sha256(drawn).hexdigest() != _DIGEST)


def relative_error(basis: Basis, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest |difference| / |reference|, Frobenius norms, to float64 on random operands.

    Of y, dW and the gradients of both together; x (tokens, in), W and dy in `dtype`. NaN if one of
    them is.
    """
    generator = torch.Generator().manual_seed(basis.r)
    n_in, n_out, r, n, d = basis.in_features, basis.out_features, basis.r, basis.n, basis.d
    shapes = (tokens, n_in), (n_out, n_in), (r, n), (n, d), (tokens, n_out), (n_out, n_in)
    drawn = (torch.randn(s, generator=generator, dtype=torch.float32) for s in shapes)
    x, W, lam, gam, dy, ddW = drawn
    given = x.to(dtype), (W / n_in**0.5).to(dtype), lam, gam / d, dy.to(dtype), ddW

    x, W, lam, gam, dy, ddW = (t.detach().to(device) for t in given)
    leaves = [t.requires_grad_() for t in (x, lam, gam)]
    y, dW = linear(x, W, None, basis, lam, gam), delta_weight(basis, lam, gam)
    got = y, dW, *grad((y, dW), leaves, (dy, ddW))

    A, B = basis.dense(dtype=torch.float64)
    x, W, lam, gam, dy, ddW = (t.double() for t in given)
    leaves = [t.requires_grad_() for t in (x, lam, gam)]
    y = linear_reference(x, W, None, A, B, lam, gam)
    dW = delta_weight_reference(A, B, lam, gam, 1.0, n_out, n_in)
    want = y, dW, *grad((y, dW), leaves, (dy, ddW))

    errors = []
    for mine, true in zip(got, want, strict=True):
        true = true.detach()
        difference = mine.detach().cpu().double() - true
        errors.append(float(difference.norm() / true.norm()))
    return _largest(errors)


def _largest(errors: list[float]) -> float:
    # Python's max passes over a NaN that is not the first.
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _processor() -> str:
    names = re.findall("^model name\t: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _cards() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(map(_card, range(torch.cuda.device_count())))


def _card(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    without = "" if has_cuda_kernels(torch.device("cuda", index)) else ", without our kernels"
    return f"{facts.name} (sm_{facts.major}{facts.minor}, {facts.total_memory >> 30} GiB{without})"

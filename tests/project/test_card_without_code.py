"""A card that has no kernels: plain torch on it, after one warning.

There is no card here. A stand-in for the library, which says so of every card and has no kernel at
all, is given the CPU's tensors: a call of any kernel would end the process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_interface import interface

from randlora_ext import devices

ROOT = Path(__file__).parents[2]
if not (ROOT / "csrc" / "core").is_dir() or shutil.which("cc") is None:
    pytest.skip("needs a C compiler and the sources of the extension", allow_module_level=True)

LIBRARY = """
int times_asked = 0;
static const char *refusal(int card) { ++times_asked; return "no kernel image is available"; }
static const struct {
  unsigned long long interface; const char *build;
  void *describe, *make_current, *refusal, *rest[64];
} table = {INTERFACE, "nvcc, for another card", 0, 0, (void *)refusal, {0}};
const void *randlora_cuda_kernels(void) { return &table; }
"""
PROGRAM = """
import ctypes, sys, warnings
import pytest
import torch
from randlora_ext import Basis, _C, delta_weight, devices, linear
from randlora_ext.diagnostics import LIMITS, relative_error
from randlora_ext.ops import functional

cpu, f32 = torch.device("cpu"), torch.float32
hadamard, independent = Basis(64, 48, 8, seed=1), Basis(64, 48, 8, 0.07)
dense = Basis.from_dense(torch.randn(8, 48), torch.randn(64, 48), 64, 48)
hadamard.packed(), independent.packed(), dense.packed()  # by the CPU's kernels
oracle, to_dense = hadamard.dense(dtype=torch.float64), Basis.dense

# From now on the CPU is the card to the operators and, within `card`, to Python.
_C.load_cuda(sys.argv[1], True)
card = pytest.MonkeyPatch()
asked = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "times_asked")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    card.setattr(devices, "_SERVES_CPU", True)
    for _ in range(2):
        assert functional.what_computes(hadamard, cpu, f32) == "plain torch"
    try:
        x, lam, gam = torch.randn(3, 64), torch.randn(8, 6), torch.randn(6, 48)
        linear(x, None, None, independent, lam, gam)
    except ValueError as error:
        print("ValueError", error)
    card.undo()
    card.setattr(
        Basis, "dense", lambda b, *a, **k: oracle if b is hadamard else to_dense(b, *a, **k)
    )
    # Forward, gradients, dW and W + dW, against float64.
    for basis in (hadamard, dense):
        for dtype, limit in LIMITS.items():
            for tokens in (1, 300):
                error = relative_error(basis, tokens, dtype, cpu)
                assert error <= limit, (basis, dtype, tokens, error)
    # Experts, as one operator.
    lam, gam = torch.randn(3, 8, 6, requires_grad=True), torch.randn(3, 6, 48, requires_grad=True)
    stack = torch.ops.randlora.hadamard_weight(None, lam, gam, *hadamard.packed(), False, 1.0)
    for each in range(3):
        torch.testing.assert_close(stack[each], delta_weight(hadamard, lam[each], gam[each]))
    stack.sum().backward()
    assert lam.grad.abs().sum() > 0 and gam.grad.abs().sum() > 0

    try:
        planes = torch.empty(2, 1, 1, dtype=torch.int64)
        torch.ops.randlora.fill_planes_(planes, 1, 0, 0, 0, 64, 1 << 20)
    except RuntimeError as error:
        print("RuntimeError", str(error).splitlines()[0])
assert asked.value == 1, asked.value
for each in told:
    if "randlora" in str(each.message):
        print(each.category.__name__, each.message)
"""


def test_plain_torch_serves_a_card_without_code(tmp_path):
    library = tmp_path / "library.so"
    command = ["cc", "-x", "c", "-shared", "-fPIC", f"-DINTERFACE={interface()}", "-"]
    subprocess.run([*command, "-o", library], input=LIBRARY, text=True, check=True)
    settings = {k: v for k, v in os.environ.items() if not k.startswith("RANDLORA_")}
    command = [sys.executable, "-c", PROGRAM, library]
    done = subprocess.run(command, env=settings, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    of_layer, of_operator, warning = done.stdout.splitlines()
    why = "no kernel image is available"
    assert of_layer.startswith("ValueError x is on cpu, where independent bases need our kernels")
    assert f"not built for cpu: {why}" in of_layer
    assert of_operator.startswith("RuntimeError") and f"not built for card 0: {why}" in of_operator
    assert warning.startswith("RuntimeWarning randlora_ext: the CUDA kernels (nvcc, for another")
    assert f"not built for cpu: {why}" in warning and "RANDLORA_CUDA=1" in warning


def test_a_build_without_kernels_says_so_when_a_card_is_first_used(monkeypatch):
    monkeypatch.setattr(devices._C, "cuda_build", lambda: "")
    monkeypatch.setattr(devices, "CUDA_STATUS", "not loaded: built without")
    monkeypatch.setattr(devices, "_told", set())
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(2):
            assert not devices.has_kernels(torch.device("cuda"))
    (warning,) = told
    assert str(warning.message).startswith(
        "randlora_ext: the CUDA kernels are not loaded: built without. Without them Hadamard and "
        "dense bases run in plain torch on a card"
    )

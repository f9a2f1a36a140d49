"""``python -m randlora_ext``: what a bug report needs, and a check of the kernels."""

import math
from pathlib import Path

import pytest
import torch
from layer_cases import run_python

import randlora_ext
from randlora_ext import diagnostics


def test_it_reports_and_passes():
    out = run_python("-m", "randlora_ext")
    for needed in (randlora_ext.__version__, torch.__version__, "CUDA kernels", "all is well"):
        assert needed in out
    assert out.count("cpu bfloat16") == 3 and str(Path(randlora_ext.__file__).parent) in out


@pytest.mark.parametrize(
    "name, wrong, told",
    [
        ("linear", lambda y: y * 1.001, "FAILED: cpu float32 hadamard"),
        ("delta_weight", lambda dW: dW * 1.001, "FAILED: cpu float32 hadamard"),
        ("delta_weight", lambda dW: dW * math.nan, "FAILED: cpu float32 hadamard"),
        ("generate_planes", lambda planes: planes ^ 1, "FAILED: cpu generated basis"),
    ],
)
def test_a_wrong_kernel_fails_the_check(monkeypatch, capsys, name, wrong, told):
    right = getattr(diagnostics, name)
    monkeypatch.setattr(diagnostics, name, lambda *arguments: wrong(right(*arguments)))
    assert diagnostics.check() == 1
    assert told in capsys.readouterr().out

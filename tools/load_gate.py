"""The load gate: the package built and opened under a torch with CUDA, on a machine without a card.

    python tools/load_gate.py                            # downloads torch 2.11 with CUDA: 3 GB
    python tools/load_gate.py --python VENV/bin/python    # of a venv that has such a torch
    python tools/load_gate.py --python ... --install dist/NAME.whl   # what another torch built

Installs into a temporary folder. Checks that the CUDA library exports one symbol and links neither
torch nor a CUDA runtime; that the package loads it and registers its operators under the CUDA key;
that torch has the functions which operators look up by name; and that CPU tensors still work.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from check_wheel import library_findings

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.11.0"  # the oldest supported; PyPI's wheel has CUDA

USE = """
import ctypes, pathlib, re, sys
import torch
assert torch.version.cuda, f"torch {torch.__version__} has no CUDA"
import randlora_ext
from randlora_ext.reference import delta_weight_reference
assert pathlib.Path(randlora_ext.__file__).is_relative_to(sys.argv[1]), randlora_ext.__file__
info = randlora_ext.build_info()
print("torch", torch.__version__, info)
assert info["cuda"].startswith("nvcc "), info
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("randlora::")]
keys = {n: torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA") for n in names}
print("CUDA key of", len(keys), "operators:", *(n.split("::")[1] for n in sorted(keys)))
assert len(keys) >= 10 and all(keys.values()), keys
wanted = re.findall(r'entry<[^(]*\\("(.*?)", "(.*?)"\\)', pathlib.Path(sys.argv[2]).read_text())
assert len(wanted) >= 3, wanted
for file, name in wanted:
    getattr(ctypes.CDLL(file), name)
print("torch has", *(name for _, name in wanted))
basis = randlora_ext.TernaryBasis(96, 130, 8, 1 / 3)
lam, gam = torch.randn(8, basis.n), torch.randn(basis.n, basis.d)
want = delta_weight_reference(*basis.dense(), lam, gam, 1.0, 130, 96)
torch.testing.assert_close(randlora_ext.delta_weight(basis, lam, gam), want)
print("CPU tensors work")
"""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    print("$", *command[1:4], flush=True)
    subprocess.run(command, cwd=cwd, env=os.environ | environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, help="of an environment that has torch with CUDA")
    parser.add_argument("--install", default=str(ROOT), help="default: this checkout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        python = args.python and args.python.absolute()
        if python is None:
            run(sys.executable, "-m", "venv", work / "venv")
            python = work / "venv" / "bin" / "python"
            # Settings of pip may prefer a torch without CUDA.
            plain = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
            run(python, "-m", "pip", "install", "-q", TORCH, "numpy", "safetensors", **plain)
        pip = [python, "-m", "pip", "install", "-q", "--target"]
        tools, site = work / "tools", work / "site"
        run(*pip, tools, "setuptools>=77,<82", "wheel", "pybind11", "ninja")
        # torch is the environment's own; its setuptools may be too old.
        build = {"PYTHONPATH": str(tools), "PATH": f"{tools / 'bin'}:{os.environ['PATH']}"}
        command = (*pip, site, "--no-build-isolation", "--no-deps", args.install)
        run(*command, RANDLORA_CUDA="1", **build)
        if findings := library_findings(site / "randlora_ext" / "librandlora_cuda.so"):
            sys.exit(f"load gate: failed: {findings}")
        binding = ROOT / "csrc" / "torch" / "backend.cpp"
        run(python, "-c", USE, site, binding, cwd=work, PYTHONPATH=str(site))
    print("load gate: passed")


if __name__ == "__main__":
    main()

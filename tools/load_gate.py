"""The load gate: the installed package under a torch with CUDA, on a machine without a card.

    python -m venv /tmp/gate && . /tmp/gate/bin/activate
    pip install torch==2.11.0 setuptools wheel pybind11 ninja    # PyPI's torch has CUDA: 3 GB
    RANDLORA_CUDA=1 pip install --no-build-isolation . && python tools/load_gate.py

Checks that the CUDA library exports one symbol and links neither torch nor a CUDA runtime; that the
package loads it and registers its operators under the CUDA key; and that torch has the functions
which operators look up by name.
"""

import ctypes
import re
from pathlib import Path

import torch
from check_wheel import library_findings

import randlora_ext

BINDING = Path(__file__).resolve().parents[1] / "csrc" / "torch"

assert torch.version.cuda, f"torch {torch.__version__} has no CUDA"
info = randlora_ext.build_info()
print("torch", torch.__version__, info)
assert info["cuda"].startswith("nvcc "), info
findings = library_findings(Path(randlora_ext.__file__).with_name("librandlora_cuda.so"))
assert not findings, findings
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("randlora::")]
keys = {n: torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA") for n in names}
print("CUDA key of", len(keys), "operators:", *(n.split("::")[1] for n in sorted(keys)))
assert len(keys) >= 10 and all(keys.values()), keys
sources = "".join(path.read_text() for path in sorted(BINDING.rglob("*.cpp")))
wanted = re.findall(r'torch_function<\w+>\(\s*"(.*?)",\s*"(.*?)"\)', sources)
assert len(wanted) == sources.count("torch_function<") >= 3, wanted
for file, name in wanted:
    getattr(ctypes.CDLL(file), name)
print("torch has", *(name for _, name in wanted))
print("load gate: passed")

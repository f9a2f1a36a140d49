"""Which devices our kernels serve. Loads the CUDA library if torch has CUDA."""

import os
import warnings
from pathlib import Path

import torch

from . import _C

LIBRARY = Path(__file__).parent / "librandlora_cuda.so"
# Tests load the kernels compiled for the CPU (docs/cuda-on-cpu.md).
_SERVES_CPU = os.environ.get("RANDLORA_CUDA_SERVES_CPU") == "1"


def _load() -> str:
    """Loads the library; returns what `build_info()["cuda"]` says."""
    path = os.environ.get("RANDLORA_CUDA_LIBRARY")
    if path is None and torch.version.cuda is None:
        return "not loaded: this torch is built without CUDA"
    if path is None and not LIBRARY.is_file():
        return (
            "not loaded: randlora_ext was built without CUDA kernels; install nvcc and reinstall "
            "with RANDLORA_CUDA=1 pip install --no-build-isolation"
        )
    try:
        _C.load_cuda(path or str(LIBRARY), _SERVES_CPU)
    except RuntimeError as error:
        why = str(error).splitlines()[0].rpartition("randlora: ")[2]  # without torch's position
        why = f"not loaded: {why}"
        warnings.warn(
            f"randlora_ext: the CUDA kernels are {why}. On a card Hadamard and dense bases run in "
            "plain torch, and independent bases cannot run",
            RuntimeWarning,
            stacklevel=2,
        )
        return why
    return _C.cuda_build()


CUDA_STATUS: str = _load()


def cuda_serves(device_type: str) -> bool:
    """Whether the CUDA kernels run on tensors of this device type."""
    types = ("cuda", "cpu") if _SERVES_CPU else ("cuda",)
    return device_type in types and bool(_C.cuda_build())


def serve(device_type: str) -> bool:
    """Whether any of our kernels run on tensors of this device type."""
    return device_type == "cpu" or cuda_serves(device_type)

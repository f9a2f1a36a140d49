"""Which devices our kernels serve. Loads the CUDA library if torch has CUDA."""

import os
import warnings
from pathlib import Path

import torch

from . import _C
from .tracing import constant_while_tracing

LIBRARY = Path(__file__).parent / "librandlora_cuda.so"
# Tests load the kernels compiled for the CPU (CONTRIBUTING.md, "The execution gate").
_SERVES_CPU = os.environ.get("RANDLORA_CUDA_SERVES_CPU") == "1"
_told: set[int | None] = set()  # cards of which was warned; None is all of them


def _warn_once(card: int | None, kernels: str) -> None:
    """`kernels`: what is wrong with them, as the end of "the CUDA kernels"."""
    if card in _told:
        return
    _told.add(card)
    warnings.warn(
        f"randlora_ext: the CUDA kernels {kernels}. Without them Hadamard and dense bases run in "
        "plain torch on a card, and independent bases cannot run. Installed again on this machine "
        "with RANDLORA_CUDA=1, they are built for its cards of sm_80 and newer",
        RuntimeWarning,
        stacklevel=4,
    )


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
        _warn_once(None, f"are {why}")
        return why
    return _C.cuda_build()


CUDA_STATUS: str = _load()


def cuda_refusal(device: torch.device) -> str:
    """Why the CUDA kernels do not serve tensors of this device, as the end of "they are"; empty if
    they do. Warns once of a card on which they do not run.
    """
    types = ("cuda", "cpu") if _SERVES_CPU else ("cuda",)
    if device.type not in types:
        return f"not there for {device.type}"
    if not _C.cuda_build():
        _warn_once(None, f"are {CUDA_STATUS}")
        return CUDA_STATUS
    card = None
    if device.type == "cuda":
        if not torch.cuda.is_initialized():
            return ""  # the tensor is a fake one: no card was used, and there may be none to ask
        card = torch.cuda.current_device() if device.index is None else device.index
    why = _C.cuda_refusal(card)
    if not why:
        return ""
    why = f"not built for {device}: {why}"
    _warn_once(card, f"({_C.cuda_build()}) are {why}")
    return why


def has_cuda_kernels(device: torch.device) -> bool:
    """Whether the CUDA kernels run on tensors of this device."""
    return not cuda_refusal(device)


@constant_while_tracing
def has_kernels(device: torch.device) -> bool:
    """Whether any of our kernels run on tensors of this device."""
    if device.type == "cpu" and not (_SERVES_CPU and _C.cuda_build()):
        return True
    return has_cuda_kernels(device)

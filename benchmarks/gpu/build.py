"""Builds the extension in place: for the card at hand, or (--dry) the CUDA library for the CPU."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .stage import Stage

ROOT = Path(__file__).resolve().parents[2]
CPU_LIBRARY = ROOT / "build-cpp" / "librandlora_cuda_on_cpu.so"
_LOADED = (
    "import json, randlora_ext; info = randlora_ext.build_info(); print(json.dumps(info));"
    "raise SystemExit(info['cuda'].startswith('not loaded'))"
)


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """(exit status, everything it said); the output goes to the log as well. Status 124: it was
    stopped after `seconds`. What it started may outlive it until the stage ends."""
    print("+", " ".join(command), environment or "", flush=True)
    # To a file: a pipe would be waited for until its last holder is gone.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=output,
                stderr=subprocess.STDOUT, timeout=max(seconds, 0.1),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = 124
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    return status, text


def extension(seconds: float, **environment: str) -> tuple[int, str]:
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, **environment)


def architecture() -> str:
    """The TORCH_CUDA_ARCH_LIST of the first card. That of the environment is for other cards, too,
    or for others only."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"


def main() -> None:
    stage = Stage(__doc__)
    started = time.monotonic()

    def loaded() -> tuple[int, str]:
        return run([sys.executable, "-c", _LOADED], stage.left())

    if stage.dry:
        target = ["cmake", "--build", "build-cpp", "-j2", "--target", "cuda_on_cpu_library"]
        status, text = run(["cmake", "-S", ".", "-B", "build-cpp"], stage.left())
        if status == 0:
            status, text = run(target, stage.left())
        if status == 0 and loaded()[0] != 0:  # there is no extension, or one of other sources
            status, text = extension(stage.left(), RANDLORA_CUDA="0")
    else:
        arch = architecture()
        status, text = extension(stage.left(), RANDLORA_CUDA="1", TORCH_CUDA_ARCH_LIST=arch)
    built = time.monotonic() - started
    if status == 0:
        status, text = loaded()
    said = text.strip().splitlines() or ["nothing"]
    stage.row(built=status == 0, seconds=built, said=said[-1][:500])
    sys.exit(status)


if __name__ == "__main__":
    main()

"""The stages of gpu_run.py: their order, what they need, the commands that they consist of."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

STAGES = (
    "build", "parity", "model", "hadamard", "memcheck", "tests", "layers", "kernels", "racecheck",
    "ncu", "slow",
)  # fmt: skip
DEFAULT = STAGES[:4]
PACKAGES = {
    "build": ("setuptools", "pybind11", "numpy", "ninja"),
    **dict.fromkeys(("model", "hadamard", "layers"), ("peft", "transformers")),
    **dict.fromkeys(("tests", "slow"), ("pytest", "hypothesis")),
}
FINDING = 9  # exit status of compute-sanitizer if it found something
METRICS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum,"
    "l1tex__data_pipe_lsu_wavefronts.sum,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,"
    "smsp__inst_executed.sum,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,"
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__warps_active.avg.pct_of_peak_sustained_active"
)


@dataclass(frozen=True)
class Command:
    name: str
    argv: list[str]
    seconds: float  # limit
    expected: int = 0  # exit status
    settings: dict[str, str] = field(default_factory=dict)  # of the environment
    watched: list[str] = field(default_factory=list)  # the tool that starts it, with its options
    card_only: bool = False


def commands(stage: str, card: dict, dry: bool, csv: Path) -> list[Command]:
    python, dry_option = sys.executable, ["--dry"] * dry

    def gpu(name: str, *options: str) -> list[str]:
        return [python, "-m", f"gpu.{name}", *options, *dry_option]

    def sanitizer(tool: str, seconds: float, *options: str) -> Command:
        # Only our kernels are watched, and no two tensors share an allocation.
        watched = ["compute-sanitizer", "--tool", *tool.split(), "--kernel-name",
                   "kernel_substring=randlora", "--print-limit", "20", "--launch-timeout", "120",
                   "--error-exitcode", str(FINDING)]  # fmt: skip
        name = tool.split()[0]
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        plants = options == ("--plant",)
        return Command(name + " --plant" * plants, gpu("kernels", *options), seconds,
                       FINDING * plants, apart, watched,
                       card_only=plants or name != "memcheck")  # fmt: skip

    def tests(which: str, seconds: float, card_only: bool = False) -> Command:
        workers = ["-n", "4"] if importlib.util.find_spec("xdist") and not dry else []
        path = "tests/gpu" + "/test_gpu_launches.py" * dry
        # Each result is printed as it comes, so that a test that hangs hides no other.
        argv = [python, "-m", "pytest", path, "-m", which, "-o", "addopts=", "-v", "-rfE",
                "-o", "faulthandler_timeout=60", "--maxfail=30", "--tb=short",
                "-p", "no:cacheprovider", *workers]  # fmt: skip
        threads = str(max((os.cpu_count() or 1) // 4, 1))  # of the oracles, which run on the CPU
        return Command(f"GPU tests, {which}", argv, seconds, settings={"OMP_NUM_THREADS": threads},
                       card_only=card_only)  # fmt: skip

    memcheck = "memcheck --report-api-errors no"
    arch = {"TORCH_CUDA_ARCH_LIST": card.get("capability", "9.0")}
    if card["cuda"]:
        arch["RANDLORA_CUDA"] = "1"  # without nvcc the build fails
    build = [python, "setup.py", "build_ext", "--inplace"]
    load = "import randlora_ext; said = randlora_ext.build_info(); print(said)"
    if "card" in card:
        load += "; raise SystemExit(said['cuda'].startswith('not loaded'))"
    rates = json.dumps({key: value for key, value in card.items() if key.endswith("_per_s")})
    ncu = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base",
           "--kernel-name-base", "demangled", "--kernel-name", "regex:randlora",
           "--metrics", METRICS, "--log-file", str(csv)]  # fmt: skip
    known = {
        "build": [
            Command("build", build, 500, settings={} if dry else arch),
            Command("load", [python, "-c", load], 60),
        ],
        "parity": [
            Command("self-check", [python, "-m", "randlora_ext"], 60),
            Command("parity", gpu("parity"), 90),
        ],
        "model": [Command("model", gpu("model"), 120)],
        "hadamard": [Command("hadamard", gpu("layers", "--hadamard"), 75)],
        "memcheck": [sanitizer(memcheck, 90, "--ragged"), sanitizer(memcheck, 30, "--plant")],
        "tests": [tests("not slow", 150)],
        "layers": [Command("layers", gpu("layers"), 240)],
        "kernels": [Command("kernels", gpu("kernels", "--rates", rates), 120)],
        "racecheck": [sanitizer("racecheck --racecheck-report all", 150, "--ragged")],
        "ncu": [Command("ncu", gpu("kernels", "--once"), 120, watched=ncu)],
        "slow": [tests("slow", 300, card_only=True)],
    }
    return known[stage]

"""Did the tests of the execution gate run every kernel? Compares tools/cuda/budget.json, where the
compile gate wants all kernels of the library, with the kernels that the tests started.

    python tools/cuda/every_kernel.py build-cpp/kernels

Each file there is what a test wrote under CUDA_ON_CPU_KERNELS: lines of a program and an address
in it.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from kernel_usage import short_name

BUDGET = Path(__file__).resolve().parent / "budget.json"


def started(logs: list[Path]) -> set[str]:
    """The short names of the kernels in these files."""
    addresses: dict[str, set[int]] = defaultdict(set)
    for log in logs:
        for line in log.read_text().splitlines():
            program, _, address = line.rpartition(" ")
            addresses[program].add(int(address))
    names = set()
    for program, wanted in addresses.items():
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", program], capture_output=True, text=True, check=True
        ).stdout
        for line in symbols.splitlines():
            address, _, name = line.split(" ", 2)
            if int(address, 16) in wanted:
                names.add(short_name(name))
    return names


def main() -> int:
    logs = sorted(Path(sys.argv[1]).glob("*.txt"))
    kernels = {name for line in json.loads(BUDGET.read_text())["kernels"] for name in line["names"]}
    missing = sorted(kernels - started(logs))
    for name in missing:
        print(f"no test started {name}")
    print(f"{len(kernels) - len(missing)} of {len(kernels)} kernels ran")
    return bool(missing or not kernels)


if __name__ == "__main__":
    sys.exit(main())

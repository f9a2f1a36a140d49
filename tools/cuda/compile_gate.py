"""The compile gate: what nvcc makes of every kernel in csrc/cuda, against tools/cuda/budget.json.

    python tools/cuda/compile_gate.py                       # all sources, all architectures
    python tools/cuda/compile_gate.py --archs sm_90 a_up.cu # while working on one file
    python tools/cuda/compile_gate.py --update              # writes the budget anew

A kernel fails if it spills, has a stack or static shared memory; uses more registers than its
budget on sm_80 or sm_90; is not in the budget; lacks an instruction that the budget says it has;
or locks to add (INSTRUCTIONS in kernel_usage.py). So does a budget entry without a kernel.

It needs nvcc and c++filt. Exit status 1 if anything failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernel_usage import INSTRUCTIONS, Usage, instructions_by_name, parse_ptxas, short_names

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
BUDGET = HERE / "budget.json"
BUDGETED = ("sm_80", "sm_90")
# Compiling to PTX takes most of nvcc's time, and two PTX serve all cards: the kernels use nothing
# newer than 8.0, except for a limit of their own from 10.0 on (b_lists.cu).
PTX_OF = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90"), "compute_80"),
    **dict.fromkeys(("sm_100", "sm_120"), "compute_100"),
}
LOCK = "ATOMS.CAST.SPIN"


Kernels = dict[str, dict[str, Usage]]  # name -> architecture -> usage
Budget = dict[str, dict]  # name -> {"registers": {architecture: number}, "has": [instruction]}


# ---- the rules -----------------------------------------------------------------------------------


def check(kernels: Kernels, budget: Budget, tolerance: int) -> list[str]:
    """What is wrong with the kernels of one source, given its part of the budget."""
    wrong = []
    for name, by_arch in kernels.items():
        allowed = budget.get(name, {"registers": {}, "has": []})
        if name not in budget:
            wrong.append(f"{name}: is not in the budget")
        for arch, usage in by_arch.items():
            here = f"{name} on {arch}"
            for what in ("spills", "stack", "shared"):  # none of which a kernel may have
                if size := getattr(usage, what):
                    wrong.append(f"{here}: {what} of {size} bytes")
            if LOCK in usage.instructions:
                wrong.append(f"{here}: has {LOCK}")
            for instruction in set(allowed["has"]) - usage.instructions:
                wrong.append(f"{here}: has no {instruction}, and the budget says it has")
            if arch in BUDGETED and name in budget:
                registers = allowed["registers"][arch]
                if usage.registers > registers + tolerance:
                    told = f"{usage.registers} registers, budget {registers} + {tolerance}"
                    wrong.append(f"{here}: {told}")
    gone = [name for name in budget if name not in kernels]
    return wrong + [f"{name}: is in the budget but not in the source" for name in gone]


def new_budget(kernels: Kernels, old: Budget) -> Budget:
    """The measured figures, registers in eights, as a card gives them out. Instructions that the
    old budget names stay: the check may refute."""
    return {
        name: {
            "registers": {arch: by_arch[arch].registers // 8 * 8 for arch in BUDGETED},
            "has": [
                instruction
                for instruction in INSTRUCTIONS
                if instruction in old.get(name, {}).get("has", [])
                or all(instruction in usage.instructions for usage in by_arch.values())
            ],
        }
        for name, by_arch in kernels.items()
    }


# In the file, kernels of a source with equal figures share a line.
def load(text: str) -> tuple[dict, dict[str, Budget]]:
    """The file, and the budget of each source."""
    file = json.loads(text)
    sources: dict[str, Budget] = {}
    for line in file["kernels"]:
        figures = {key: line[key] for key in ("registers", "has")}
        sources.setdefault(line["source"], {}).update(dict.fromkeys(line["names"], figures))
    return file, sources


def dump(nvcc: str, tolerance: int, sources: dict[str, Budget]) -> str:
    groups: dict[str, list[str]] = {}
    for source, kernels in sorted(sources.items()):
        for name, figures in sorted(kernels.items()):
            groups.setdefault(json.dumps({"source": source, **figures}), []).append(name)
    lines = [json.dumps({**json.loads(key), "names": names}) for key, names in groups.items()]
    head = f'{{"nvcc": "{nvcc}", "register_tolerance": {tolerance}, "kernels": [\n  '
    return head + ",\n  ".join(lines) + "\n]}\n"


# ---- running the tools ---------------------------------------------------------------------------


def run(command: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"compile gate: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    return found or sys.exit("compile gate: there is no nvcc: set CUDA_HOME, or put it on PATH")


def compile_one(
    nvcc: str, source: Path, archs: list[str], folder: Path
) -> dict[str, dict[str, Usage]]:
    """Usage by architecture and mangled name, for architectures that share one PTX."""
    ptx = folder / f"{source.stem}.{archs[0]}.ptx"
    command = [nvcc, "-std=c++17", f"-I{SOURCES}", str(source)]
    run([*command, "-ptx", f"-arch={PTX_OF[archs[0]]}", "-o", str(ptx)])
    instructions = instructions_by_name(ptx.read_text())
    found = {}
    for arch in archs:
        cubin = ptx.with_suffix(f".{arch}.cubin")
        command = [nvcc, "-cubin", f"-arch={arch}", "-Xptxas", "-v", str(ptx), "-o", str(cubin)]
        said = run(command)
        found[arch] = parse_ptxas(said.stderr + said.stdout)
        if set(found[arch]) != set(instructions):
            sys.exit(f"compile gate: {source.name}: ptxas tells of other functions than PTX")
        for name, usage in found[arch].items():
            usage.instructions = instructions[name]
    return found


def measure(nvcc: str, sources: list[Path], archs: list[str]) -> dict[str, Kernels]:
    kernels: dict[str, Kernels] = {source.name: {} for source in sources}
    groups: dict[str, list[str]] = {}
    for arch in archs:
        groups.setdefault(PTX_OF[arch], []).append(arch)

    def one(job: tuple[Path, list[str]]) -> tuple[Path, dict[str, dict[str, Usage]]]:
        return job[0], compile_one(nvcc, *job, Path(folder))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs_in_order = [(source, group) for source in sources for group in groups.values()]
        for source, by_arch in pool.map(one, jobs_in_order):
            for arch, usages in by_arch.items():
                names = short_names(sorted(usages)) if usages else {}
                for mangled, usage in usages.items():
                    kernels[source.name].setdefault(names[mangled], {})[arch] = usage
    for source, found in kernels.items():
        for name, by_arch in found.items():
            if missing := set(archs) - set(by_arch):
                sys.exit(f"compile gate: {source}: {name} does not exist on {sorted(missing)}")
    return kernels


def print_table(kernels: dict[str, Kernels], budget: dict[str, Budget]) -> None:
    """Registers as used/budget."""
    for source, found in kernels.items():
        print(f"\n{source}: {len(found)} kernels")
        for name, by_arch in sorted(found.items()):
            allowed = budget.get(source, {}).get(name, {"registers": {}})["registers"]
            cells = [f"{arch} {u.registers}/{allowed.get(arch, '')}" for arch, u in by_arch.items()]
            print(f"  {name:64}" + "".join(f"{cell:15}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", help="names of files in csrc/cuda; default: all")
    parser.add_argument("--archs", default=",".join(PTX_OF), help="default: %(default)s")
    parser.add_argument("--update", action="store_true", help="write budget.json anew")
    args = parser.parse_args()

    nvcc, archs = find_nvcc(), args.archs.split(",")
    if args.update and not set(BUDGETED) <= set(archs):
        parser.error(f"--update needs {' and '.join(BUDGETED)}")
    found = [path for path in SOURCES.rglob("*.cu") if path.name != "table.cu"]
    sources = [path for path in found if not args.sources or path.name in args.sources]
    # Largest first, so that the last to be compiled is a short one.
    sources.sort(key=lambda path: (-path.stat().st_size, path.name))
    if not sources or len(sources) < len(args.sources):
        parser.error(f"csrc/cuda has no such files: {' '.join(args.sources)}")

    started = time.monotonic()
    file, budget = load(BUDGET.read_text())
    tolerance = file["register_tolerance"]
    version = re.search(r"V([\d.]+)", run([nvcc, "--version"]).stdout)[1]
    kernels = measure(nvcc, sources, archs)
    if args.update:
        file["nvcc"] = version
        for source, found in kernels.items():
            budget[source] = new_budget(found, budget.get(source, {}))
        if not args.sources:
            budget = {source: budget[source] for source in kernels}
        BUDGET.write_text(dump(version, tolerance, budget))
    print_table(kernels, budget)
    if file["nvcc"] != version:
        print(f"\nThe budget was made with nvcc {file['nvcc']}; this is {version}.")

    wrong = [
        f"{source}: {what}"
        for source, found in kernels.items()
        for what in check(found, budget.get(source, {}), tolerance)
    ]
    if not args.sources:
        gone = sorted(set(budget) - set(kernels))
        wrong += [f"{source}: is in the budget, but not in csrc/cuda" for source in gone]
    total = sum(map(len, kernels.values()))
    print()
    for line in wrong:
        print(f"FAILED {line}")
    print(
        f"compile gate: {total} kernels in {len(sources)} files, nvcc {version}, "
        f"{' '.join(archs)}, {time.monotonic() - started:.0f} s: "
        f"{f'{len(wrong)} failures' if wrong else 'passed'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

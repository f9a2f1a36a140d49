"""What ptxas says about kernels and what their PTX holds, read for the compile gate.

What is not understood ends the program: it is never taken for "nothing to see".
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Usage:
    """One kernel on one architecture."""

    registers: int
    shared: int  # static; what a launch adds is not known here
    stack: int
    spills: int
    instructions: set[str] = field(default_factory=set)  # keys of INSTRUCTIONS


# The instructions that the gate looks for: the name of each in a card's code, and the PTX that
# ptxas translates to it. In 1,830 disassembled kernels (305, six architectures), a kernel had the
# one if and only if it had the other.
INSTRUCTIONS = {
    "HMMA": r"\bmma\.",  # tensor cores
    "STG.128": r"\bst\.global(\.\w+)*\.(v4\.\w32|v2\.\w64)\b",  # 16-byte stores
    # The lock that an atomic addition turns into where memory is shared, or may be, unless it is of
    # 32-bit integers.
    "ATOMS.CAST.SPIN": r"\b(atom|red)\.(?!\S*global)\S*\badd\.\S*(?<![us]32)\s",
}


def parse_ptxas(text: str) -> dict[str, Usage]:
    """Usage by mangled name from `-Xptxas -v`. A function that is not inlined has no registers of
    its own but may spill; it is listed under its own name."""
    functions = re.findall(
        r"Function properties for (\S+)\n +(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads(?:\nptxas info +: Used (\d+) registers(.*))?",
        text,
    )
    usages = {}
    for name, frame, stores, loads, registers, rest in functions:
        more = {what: int(n) for n, what in re.findall(r"(\d+) bytes (smem|cumulative st)", rest)}
        usages[name] = Usage(
            registers=int(registers or 0),
            shared=more.get("smem", 0),
            stack=max(int(frame), more.get("cumulative st", 0)),
            spills=int(stores) + int(loads),
        )
    entries = re.findall(r"Compiling entry function '(\S+)'", text)
    if unknown := [n for n in entries if n not in usages or not usages[n].registers]:
        raise SystemExit(f"compile gate: ptxas says too little about {unknown}:\n{text}")
    return usages


def instructions_by_name(ptx: str) -> dict[str, set[str]]:
    """Those of INSTRUCTIONS that each function has, by its mangled name."""
    head = r"^(?:\.\w+\s+)*\.(?:entry|func)\s+(?:\(.*\)\s*)?([\w$]+)\s*\("
    _, *names_and_bodies = re.split(head, ptx, flags=re.M)
    return {
        name: {what for what, spelled in INSTRUCTIONS.items() if re.search(spelled, body)}
        for name, body in zip(names_and_bodies[::2], names_and_bodies[1::2], strict=True)
    }


def short_name(demangled: str) -> str:
    """`fill<float, 4>` of `void randlora::cuda::(anonymous namespace)::fill<float, 4>(float*)`."""
    parameters = r"\((?:[^()]|\([^()]*\))*\)$"  # nested once: (anonymous namespace)
    name = re.sub(parameters, "", demangled.strip().removeprefix("void "))
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|_GLOBAL__N__\w+::", "", name)
    return re.sub(r"randlora::(cuda::)?|\((int|bool|long|unsigned int)\)", "", name)


def short_names(mangled: list[str]) -> dict[str, str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = dict(zip(mangled, map(short_name, done.stdout.splitlines()), strict=True))
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise SystemExit(f"several kernels are called {', '.join(twice)}: rename them")
    return names

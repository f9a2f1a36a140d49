"""What ptxas and nvdisasm say about kernels, read for the compile gate."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass


class ToolError(Exception):
    """A tool said something that is not understood: never taken for "nothing to see"."""


@dataclass
class Usage:
    """One kernel on one architecture."""

    registers: int
    shared: int  # static; what a launch adds is not known here
    stack: int
    spills: int
    hmma: int = 0
    wide_stores: int = 0  # of 16 bytes to global memory
    spin_locks: int = 0


def parse_ptxas(text: str) -> dict[str, Usage]:
    """Usage by mangled name from `-Xptxas -v`. A function that is not inlined has no registers of
    its own but may spill; it is listed under its own name."""
    entries = set(re.findall(r"Compiling entry function '(\S+)' for 'sm_\w+'", text))
    usages = {}
    for block in re.split(r"Function properties for ", text)[1:]:
        name = block.split(None, 1)[0]
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        used = re.search(r"Used (\d+) registers(.*)", block)
        if memory is None or (used is None and name in entries):
            raise ToolError(f"ptxas says too little about {name}:\n{block}")
        rest = used[2] if used else ""
        shared = re.search(r"(\d+) bytes smem", rest)
        stack = re.search(r"(\d+) bytes cumulative stack", rest)
        usages[name] = Usage(
            registers=int(used[1]) if used else 0,
            shared=int(shared[1]) if shared else 0,
            stack=max(int(memory[1]), int(stack[1]) if stack else 0),
            spills=int(memory[2]) + int(memory[3]),
        )
    if missing := entries - set(usages):
        raise ToolError(f"ptxas says nothing about {', '.join(sorted(missing))}")
    return usages


def count_instructions(sass: str) -> dict[str, Counter]:
    """Instructions with their suffixes, counted by the mangled name of the function."""
    counts: dict[str, Counter] = {}
    name = None
    for line in sass.splitlines():
        if label := re.match(r"\.text\.(\S+):$", line):
            name = label[1]
            counts[name] = Counter()
        elif name and (
            found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        ):
            counts[name][found[1]] += 1
    return counts


def add_instructions(usages: dict[str, Usage], sass: str) -> None:
    counts = count_instructions(sass)
    for name, usage in usages.items():
        if not counts.get(name):
            raise ToolError(f"the disassembly has no instruction of {name}")
        for instruction, count in counts[name].items():
            if instruction.startswith("HMMA."):
                usage.hmma += count
            if re.match(r"STG\..*\b128\b", instruction):
                usage.wide_stores += count
            if instruction.startswith("ATOMS.CAST.SPIN"):
                usage.spin_locks += count


def short_name(demangled: str) -> str:
    """`fill<float, 4>` of `void randlora::cuda::(anonymous namespace)::fill<float, 4>(float*)`."""
    name = demangled.strip().removeprefix("void ")
    if name.endswith(")"):
        depth = 0
        for at in range(len(name) - 1, -1, -1):
            depth += (name[at] == ")") - (name[at] == "(")
            if depth == 0:
                name = name[:at]
                break
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|_GLOBAL__N__\w+::", "", name)
    return re.sub(r"randlora::(cuda::)?|\((int|bool|long|unsigned int)\)", "", name)


def short_names(mangled: list[str]) -> dict[str, str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = dict(zip(mangled, map(short_name, done.stdout.splitlines()), strict=True))
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ToolError(f"several kernels are called {', '.join(twice)}: rename them")
    return names

"""The compile gate's reading and rules, on texts like those of ptxas and nvdisasm: no nvcc here."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).resolve().parent / "cuda" / "compile_gate.py"


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("compile_gate", GATE)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(GATE.parent))
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 384 bytes cmem[0]
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_90'
ptxas info    : Function properties for _Z3badPf
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 48 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Function properties for _Z6helperv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""

SASS = """\
\t.target\tsm_90
//--------------------- .text._Z4goodPf --------------------------
\t.section\t.text._Z4goodPf,"ax",@progbits
.text._Z4goodPf:
        .type           _Z4goodPf,@function
_Z4goodPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R14, R4 ;
        /*0030*/                   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0034*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0038*/                   STG.E desc[UR4][R2.64+0x80], R4 ;
        /*0040*/              @UP0 EXIT ;
.text._Z3badPf:
_Z3badPf:
        /*0000*/               @P1 ATOMS.CAST.SPIN R7, [R0], R6, R7 ;
        /*0010*/                   ATOMS.ADD RZ, [R0], R6 ;
        /*0020*/                   EXIT ;
.text._Z6helperv:
        /*0000*/                   RET.REL.NODEC R2 `(_Z3badPf) ;
"""


def usage(gate, **figures):
    return gate.Usage(**{"registers": 40, "shared": 0, "stack": 0, "spills": 0, **figures})


def budget(**more):
    figures = {"registers": 40, "shared": 0, "stack": 0, "spills": 0}
    return {"k": {"sm_80": dict(figures), "sm_90": dict(figures), "tensor_cores": False, **more}}


def test_ptxas_is_read(gate):
    read = gate.parse_ptxas(PTXAS)
    assert list(read) == ["_Z4goodPf", "_Z3badPf", "_Z6helperv"]
    assert read["_Z4goodPf"] == usage(gate, registers=42)
    assert read["_Z3badPf"] == usage(gate, registers=255, shared=1024, stack=48, spills=44)
    assert read["_Z6helperv"] == usage(gate, registers=0, stack=8)


@pytest.mark.parametrize(
    "lost", ["Used 42", "0 bytes stack frame, 0", "Function properties for _Z4"]
)
def test_ptxas_that_is_not_understood_is_an_error(gate, lost):
    assert lost in PTXAS
    with pytest.raises(gate.ToolError):
        gate.parse_ptxas(PTXAS.replace(lost, "-"))


def test_disassembly_is_read(gate):
    read = gate.parse_ptxas(PTXAS)
    gate.add_instructions(read, SASS)
    figures = {name: (u.hmma, u.wide_stores, u.spin_locks) for name, u in read.items()}
    assert figures == {"_Z4goodPf": (2, 1, 0), "_Z3badPf": (0, 0, 1), "_Z6helperv": (0, 0, 0)}


@pytest.mark.parametrize(
    "sass", ["", SASS.replace(".text._Z4goodPf:", ""), SASS.replace("/*", "//")]
)
def test_disassembly_without_a_kernel_is_an_error(gate, sass):
    with pytest.raises(gate.ToolError, match="no instruction of"):
        gate.add_instructions(gate.parse_ptxas(PTXAS), sass)


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("randlora::cuda::(anonymous namespace)::fill(float*, long)", "fill"),
        (
            "void randlora::cuda::(anonymous namespace)::fill<float, (int)4>(float*)",
            "fill<float, 4>",
        ),
        (
            "void randlora::_GLOBAL__N__a0_9_x_cu_6::p<randlora::bf16, (randlora::Order)1>(int)",
            "p<bf16, (Order)1>",
        ),
        ("void randlora::cuda::k<true>(void (*)(int), long)", "k<true>"),
        ("void <unnamed>::k<(bool)1>(randlora::Basis)", "k<1>"),
        ("plain", "plain"),
    ],
)
def test_short_name(gate, demangled, short):
    from kernel_usage import short_name

    assert short_name(demangled) == short


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_two_kernels_of_one_name_are_an_error(gate):
    assert gate.short_names(["_Z4goodPf", "_Z3badPf"]) == {"_Z4goodPf": "good", "_Z3badPf": "bad"}
    with pytest.raises(gate.ToolError, match="called good"):
        gate.short_names(["_Z4goodPf", "_Z4goodPd"])


def test_within_the_budget(gate):
    for registers in (1, 40, 48):
        kernels = {"k": {arch: usage(gate, registers=registers) for arch in ("sm_80", "sm_90")}}
        assert gate.check(kernels, budget(), 8) == []
    # no budget but for sm_80 and sm_90
    assert gate.check({"k": {"sm_120": usage(gate, registers=200)}}, budget(), 8) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"spills": 4}, "spills 4 bytes"),
        ({"stack": 8}, "stack of 8 bytes"),
        ({"spin_locks": 1}, "ATOMS.CAST.SPIN"),
    ],
)
def test_refused_on_every_architecture(gate, arch, figures, says):
    (wrong,) = gate.check({"k": {arch: usage(gate, **figures)}}, budget(), 8)
    assert arch in wrong and says in wrong


def test_excused_by_hand_but_not_on_the_architectures_of_the_budget(gate):
    excuse = {"stack": 8, "spills": 16}
    spilling = {"k": {arch: usage(gate, **excuse) for arch in ("sm_80", "sm_90", "sm_120")}}
    allowed = budget(sm_120=excuse)
    allowed["k"]["sm_80"].update(excuse)  # says nothing
    wrong = gate.check(spilling, allowed, 8)
    assert [w.split(":")[0] for w in wrong] == ["k on sm_80"] * 2 + ["k on sm_90"] * 2
    assert gate.new_budget(spilling, allowed)["k"]["sm_120"] == excuse
    more = {"k": {"sm_120": usage(gate, stack=8, spills=20)}}
    assert gate.check(more, allowed, 8) == ["k on sm_120: spills 20 bytes"]


def test_over_the_budget(gate):
    (wrong,) = gate.check({"k": {"sm_80": usage(gate, registers=49)}}, budget(), 8)
    assert "49 registers, budget 40 + 8" in wrong
    (wrong,) = gate.check({"k": {"sm_90": usage(gate, shared=16)}}, budget(), 8)
    assert "16 bytes of static shared memory" in wrong


@pytest.mark.parametrize("said, count", [("tensor_cores", "hmma"), ("wide_stores", "wide_stores")])
def test_what_the_budget_says(gate, said, count):
    allowed = budget(**{said: True})
    (wrong,) = gate.check({"k": {"sm_120": usage(gate)}}, allowed, 8)
    assert "has no " in wrong and said.replace("_", " ") in wrong
    assert gate.check({"k": {"sm_120": usage(gate, **{count: 16})}}, allowed, 8) == []


def test_budget_and_sources_must_name_the_same_kernels(gate):
    assert gate.check({"k": {"sm_80": usage(gate)}}, {}, 8) == ["k: is not in the budget"]
    assert gate.check({}, budget(), 8) == ["k: is in the budget but not in the source"]
    part = budget()
    del part["k"]["sm_90"]
    assert gate.check({"k": {"sm_90": usage(gate)}}, part, 8) == [
        "k: the budget does not know sm_90"
    ]


def test_update_makes_a_budget_that_passes_and_forgets_no_tensor_cores(gate):
    kernels = {"k": {arch: usage(gate, hmma=4) for arch in ("sm_80", "sm_90", "sm_100")}}
    made = gate.new_budget(kernels, {})
    assert made["k"]["tensor_cores"] is True and made["k"]["wide_stores"] is False
    assert gate.check(kernels, made, 0) == []
    lost = {"k": {arch: usage(gate) for arch in ("sm_80", "sm_90")}}
    assert gate.new_budget(lost, {})["k"]["tensor_cores"] is False
    kept = gate.new_budget(lost, made)
    assert (
        all("no HMMA" in wrong for wrong in gate.check(lost, kept, 0)) and kept["k"]["tensor_cores"]
    )


def test_budget_file_is_json_and_has_every_source_with_a_kernel(gate):
    text = gate.dump({"nvcc": "13", "register_tolerance": 8, "sources": {"a.cu": budget()}})
    assert json.loads(text)["sources"]["a.cu"] == budget()
    committed = json.loads(gate.BUDGET.read_text())
    assert gate.BUDGET.read_text() == gate.dump(committed), "edited by hand into another shape"
    sources = {p.name: "__global__" in p.read_text() for p in gate.build.kernel_sources()}
    assert any(sources.values())
    assert {name for name, kernels in sources.items() if kernels} <= set(committed["sources"])
    assert set(committed["sources"]) <= set(sources)


@pytest.mark.parametrize("found", ["nothing", "an error"])
def test_the_whole_gate_fails_on_nothing_and_on_what_it_cannot_read(
    gate, monkeypatch, capsys, found
):
    """With tools that say nothing, neither the control nor the kernels are seen."""
    monkeypatch.setattr(gate.build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gate.build, "nvcc_version", lambda nvcc: "13.0.88")
    monkeypatch.setattr(gate, "find_nvdisasm", lambda nvcc: "nvdisasm")
    monkeypatch.setattr(sys, "argv", ["compile_gate.py"])

    def run(command):
        if found == "an error":
            raise gate.build.BuildError("nvcc says no")
        Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gate.build, "run", run)
    assert gate.main() == 1
    said = capsys.readouterr().out
    assert ("there is no kernel at all" if found == "nothing" else "nvcc says no") in said
    assert found == "an error" or "bad_kernels.cu: not found" in said


def test_without_nvcc_it_says_skipped(gate, monkeypatch, capsys):
    monkeypatch.setattr(gate.build, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["compile_gate.py"])
    assert gate.main() == 77
    assert "skipped: no nvcc" in capsys.readouterr().out

"""The command line lists, runs and profiles kernels, and says what to do about wrong calls; README's blocks run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..__main__ import main
from ..standin import nvcc

PTX = Path(__file__).parents[1]
ROOT = PTX.parents[1]
TOYS = PTX / "toys"
needs_nvcc = pytest.mark.skipif(not nvcc(), reason="no nvcc")

# Adds y to the first n numbers of x; written by hand, so that it needs no nvcc.
PLUS = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry plus(.param .u64 x, .param .u32 n, .param .f32 y)
.maxntid 64
{
    .reg .pred %p; .reg .b32 %i, %n; .reg .b64 %x, %o; .reg .f32 %v, %y;
    mov.u32 %i, %tid.x; ld.param.u32 %n, [n]; setp.ge.u32 %p, %i, %n;
    @%p bra DONE;
    ld.param.u64 %x, [x]; mul.wide.u32 %o, %i, 4; add.u64 %x, %x, %o; ld.param.f32 %y, [y];
    ld.global.f32 %v, [%x];
    add.f32 %v, %v, %y;
    st.global.f32 [%x], %v;
DONE:
    ret;
}
.visible .entry plus_table(.param .align 8 .b8 table[16])
.reqntid 32
{
    ret;
}
"""


@pytest.fixture
def plus(tmp_path: Path) -> str:
    path = tmp_path / "plus.ptx"
    path.write_text(PLUS)
    return str(path)


def test_list(plus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", plus]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "plus(u64, u32, f32): at most 64 threads, 0 bytes shared",
        "plus_table(b8[16]): exactly 32 threads, 0 bytes shared",
    ]


def test_run_shows_what_was_written(plus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", plus, "--kernel", "plus", "--block", "16", "f32:12=1.5", "0xa", "2"]) == 0
    time, written = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"plus: \d+\.\d+ s", time)
    assert written == "argument 1, f32:12: 10 of 12 written: 3.5 3.5 3.5 3.5 3.5 3.5 3.5 3.5 ..."
    assert main(["run", plus, "f32:12", "0", "1", "--kernel", "plus"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_random_tensors_are_the_seed_s(plus: str, capsys: pytest.CaptureFixture[str]) -> None:
    def written(seed: int) -> str:
        assert main(["run", plus, "--kernel", "plus", "--seed", str(seed), "f32:4", "4", "1.0"]) == 0
        return capsys.readouterr().out.splitlines()[1]

    assert written(1) == written(1) != written(2)


def test_profile(plus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", plus, "--kernel", "plus", "--grid", "2,1,1", "--block", "64", "f32:64=0", "64", "1"]) == 0
    out = capsys.readouterr().out
    assert "global memory: 1024 bytes in 32 sectors, ideal are 32" in out
    assert re.search(r"^ +\d+ +4 +512 +16 +16 +0 +0  ld\.global\.f32", out, re.MULTILINE)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  (-\S+)", text, re.MULTILINE)
    explained = re.findall(r"^  (-\S+)(?: \S+)?(?: {2,}|\n {20,})\w", text, re.MULTILINE)
    assert len(options) == 13 and explained == options


PLUS_OF = ["--kernel", "plus"]
ERRORS = {
    "missing": (["no.cu"], "expected a .cu or .ptx file, got no.cu, which is no file; check the path"),
    "other kind": ([__file__], r"expected a \.cu or \.ptx file, got .*\.py; rename it"),
    "which kernel": (["PLUS"], "name of one kernel, got several kernels; give --kernel one of: plus, plus_table"),
    "no such kernel": (["PLUS", "--kernel", "minus"], "got --kernel minus, which none has; give .* plus, plus_table"),
    "ambiguous": (["PLUS", "--kernel", "lus"], "got --kernel lus, which several have; give .* plus, plus_table"),
    "too few": (["PLUS", *PLUS_OF, "f32:4"], r"expected 3 arguments of plus\(u64, u32, f32\), got 1"),
    "too many": (["PLUS", *PLUS_OF, "f32:4", "1", "1", "1"], "expected 3 arguments of .* got 4"),
    "no pointer": (
        ["PLUS", *PLUS_OF, "f32:4", "f32:4", "1"],
        "argument 2, of type u32: expected an integer .* 'f32:4'",
    ),
    "no integer": (["PLUS", *PLUS_OF, "f32:4", "1.5", "1"], "argument 2, of type u32: expected an integer .* '1.5'"),
    "no 32 bits": (
        ["PLUS", *PLUS_OF, "f32:4", str(2**32), "1"],
        "of type u32: expected an integer of 32 bits.* '4294967296'",
    ),
    "no 64 bits": (
        ["PLUS", *PLUS_OF, str(2**64), "4", "1"],
        "of type u64: .* an integer of 64 bits, got '18446744073709551616'",
    ),
    "no float": (["PLUS", *PLUS_OF, "f32:4", "1", "f32:1"], "argument 3, of type f32: expected a number .* 'f32:1'"),
    "no type": (["PLUS", *PLUS_OF, "f33:4", "1", "1"], "argument 1, of type u64: expected a tensor .*f32, .* 'f33:4'"),
    "no shape": (["PLUS", *PLUS_OF, "f32:4,4", "1", "1"], "argument 1, of type u64: expected a tensor .* 'f32:4,4'"),
    "no value": (["PLUS", *PLUS_OF, "i32:4=1.5", "1", "1"], "argument 1, .* expected a tensor .* 'i32:4=1.5'"),
    "a struct": (["PLUS", "--kernel", "plus_table", "3"], r"argument 1, of type b8\[16\]: .* only Python can pass"),
    "too large": (
        ["PLUS", *PLUS_OF, "--block", "65", "f32:4", "4", "1"],
        "expected blocks of at most 64 threads, got 65",
    ),
    "a fault": (["PLUS", *PLUS_OF, "f32:4", "5", "1"], r"thread \(4, 0, 0\), PTX line 12: read .* outside every"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str, plus: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = ERRORS[name]
    assert main(["run", *(plus if word == "PLUS" else word for word in words)]) == 1
    output = capsys.readouterr()
    assert re.search(f"^error: .*{message}", output.err) and output.err.count("\n") == 1 and not output.out


def test_a_file_of_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "random.ptx"
    path.write_bytes(bytes(range(128, 256)))
    assert main(["list", str(path)]) == 1
    assert "expected the text of a .ptx file, got bytes that are none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "x.ptx", "3"], "list expected only a FILE, got the argument '3' too"),
        (
            ["run", "x.ptx", "--grid", "4x4"],
            "argument --grid: expected X or X,Y or X,Y,Z, each at least 1, .* got '4x4'",
        ),
        (["run", "x.ptx", "--block", "0"], "argument --block: expected .* got '0'"),
        (["run", "x.ptx", "--shared", "-5"], "argument --shared: expected an integer from 0 to .* got '-5'"),
        (["run", "x.ptx", "--resident", "0"], "argument --resident: expected an integer from 1 to .* got '0'"),
        (["run", "x.ptx", "--seed", str(2**63)], "argument --seed: expected an integer from 0 to .* got"),
        (["run", "x.ptx", "--order", "up"], "argument --order: invalid choice: 'up' .*forward"),
        (["walk", "x.ptx"], "argument action: invalid choice: 'walk' .*list.*run.*profile"),
    ],
)
def test_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["list", str(TOYS / "basics.cu")]) == 1
    assert re.search(r"expected nvcc on PATH .* got none; install .* or run `nvcc -ptx .*`", capsys.readouterr().err)


@needs_nvcc
def test_cuda_source(capsys: pytest.CaptureFixture[str]) -> None:
    transpose = [
        str(TOYS / "basics.cu"),
        "--kernel",
        "transpose",
        "--block",
        "32,8",
        "f32:32x32=1",
        "f32:32x32=0",
        "32",
    ]
    assert main(["run", *transpose, "--races", "--order", "random", "--asynchrony", "late"]) == 0
    assert "argument 2, f32:32x32: 1024 of 1024 written: 1 1" in capsys.readouterr().out
    assert main(["run", "-DNO_BARRIER", *transpose, "--races"]) == 1
    assert re.search(r"basics\.cu:\d+\): race on shared memory", capsys.readouterr().err)
    assert main(["profile", "-D", "PAD=0", *transpose]) == 0
    assert "992 by bank conflicts" in capsys.readouterr().out


README = (PTX / "README.md").read_text()


def same(text: str) -> str:
    """Text without what another machine or another version of nvcc may change."""
    text = re.sub(r"\d+\.\d+ s$|^\d+ instructions of warps", "…", text.strip(), flags=re.MULTILINE)
    return re.sub(r"(PTX line|at line) \d+|^ +\d+(?=  )", "…", text, flags=re.MULTILINE)


def ran(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("block", re.findall(r"^```console\n\$ (.*?)^```", README, re.MULTILINE | re.DOTALL))
def test_shell_of_the_readme(block: str) -> None:
    command, _, output = block.partition("\n")
    python, *words = command.split()
    assert python == "python" and same(ran([sys.executable, *words])) == same(output)


@needs_nvcc
@pytest.mark.parametrize(
    ("block", "output"),
    re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL),
)
def test_python_of_the_readme(block: str, output: str) -> None:
    assert same(ran([sys.executable, "-c", block])) == same(output)


def test_no_block_of_the_readme_is_left_out() -> None:
    assert re.findall(r"^```(\w+)$", README, re.MULTILINE) == ["console"] * 3 + ["python", "text"] * 2

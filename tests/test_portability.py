"""The CPU sources compile for machines that are not there. They are not run on those."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
DISPATCH = ROOT / "csrc/cpu/dispatch.cpp"
AVX2 = ("-mavx2", "-mf16c")


def compile_for(target: str, folder: Path, sources: list[Path], *options: str) -> str:
    """Compiles the sources together, with warnings as errors; returns the compiler's output."""
    together = folder / "together.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [
        *(sys.executable, "-m", "ziglang", "c++", "-target", target),
        *("-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror"),
        *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
        *options,
        *("-c", str(together), "-o", str(folder / "together.o")),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode else ""


@pytest.mark.parametrize(
    ("target", "variant", "options"),
    [
        ("aarch64-linux-gnu", "baseline", ()),
        ("aarch64-macos", "baseline", ()),
        ("x86_64-windows-gnu", "baseline", ()),
        ("x86_64-windows-gnu", "avx2", AVX2),
    ],
)
def test_ops_compile(target: str, variant: str, options: tuple[str, ...], tmp_path: Path) -> None:
    ops = [source for source in SOURCES if source != DISPATCH]
    define = f"-DSAMKERNELS_CPU_VARIANT={variant}"
    assert not compile_for(target, tmp_path, ops, define, *options)


@pytest.mark.parametrize(
    ("target", "options"),
    [("aarch64-linux-gnu", ()), ("x86_64-windows-gnu", ("-DSAMKERNELS_WITH_AVX2",))],
)
def test_the_choice_of_instructions_compiles(
    target: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    assert not compile_for(target, tmp_path, [DISPATCH], *options)


def test_an_error_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("#include <sys/epoll.h>\n")
    assert "sys/epoll.h" in compile_for("aarch64-macos", tmp_path, [wrong])


def test_what_msvc_does_not_know_is_in_two_files() -> None:
    """Clang would take it for Windows, too."""
    host = [*(ROOT / "csrc").glob("*.*"), *(ROOT / "csrc/cpu").glob("*")]
    words = re.compile(r"__builtin_|__attribute__|\b_cvt[a-z]+_[a-z]+\(")
    found = {path.name for path in host if words.search(path.read_text())}
    assert found == {"compiler.h", "dispatch.cpp"}

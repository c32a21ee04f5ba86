"""The build's switches, by configuring only; what `python -m samkernels` says of the result; and
versions that stand in several files. CI builds the packages (`make dist`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samkernels
from samkernels.backends import native

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")


def configure(build: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess:
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        build,
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    # The test environment's cmake and ninja, whether or not it is activated.
    path = path or os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    environment.pop("CUDACXX", None)
    return subprocess.run(
        [*command, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def path_without_nvcc(tmp_path: Path) -> str:
    """A PATH with the build tools and nothing else."""
    tools = tmp_path / "tools"
    tools.mkdir()
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for tool in (
        "cmake",
        "ninja",
        "c++",
        "cc",
        "gcc",
        "g++",
        "ar",
        "ranlib",
        "ld",
        "as",
        "nm",
        "strip",
    ):
        found = shutil.which(tool, path=search)
        if found:
            (tools / tool).symlink_to(found)
    return str(tools)


def test_off_builds_for_the_cpu(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DSAMKERNELS_CUDA=OFF")
    assert result.returncode == 0, result.stdout
    assert "samkernels: CPU build (SAMKERNELS_CUDA=OFF)" in result.stdout


def test_auto_without_nvcc_builds_for_the_cpu(tmp_path: Path, path_without_nvcc: str) -> None:
    result = configure(tmp_path / "build", path=path_without_nvcc)
    if "samkernels: CUDA build" in result.stdout:
        pytest.skip("CMake finds nvcc outside of PATH")
    assert result.returncode == 0, result.stdout
    assert "samkernels: CPU build (no nvcc was found)" in result.stdout


def test_on_without_nvcc_says_what_is_missing(tmp_path: Path, path_without_nvcc: str) -> None:
    result = configure(tmp_path / "build", "-DSAMKERNELS_CUDA=ON", path=path_without_nvcc)
    if "samkernels: CUDA build" in result.stdout:
        pytest.skip("CMake finds nvcc outside of PATH")
    assert result.returncode != 0
    message = " ".join(result.stdout.split())  # CMake breaks lines
    assert "nvcc is missing from PATH" in message


def test_unknown_switch_is_an_error(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DSAMKERNELS_CUDA=MAYBE")
    assert result.returncode != 0
    assert "give AUTO, ON or OFF" in result.stdout


@needs_nvcc
def test_given_architectures_are_taken(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DSAMKERNELS_CUDA=ON", "-DSAMKERNELS_CUDA_ARCHS=80;90")
    assert result.returncode == 0, result.stdout
    assert "architectures 80;90" in result.stdout


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible: its own is taken")
def test_default_architectures_end_with_ptx(tmp_path: Path) -> None:
    result = configure(tmp_path)
    assert result.returncode == 0, result.stdout
    # CMake's notation: "-real" is machine code only, a bare number is machine code and PTX.
    assert "architectures 75-real;80;86-real;89-real;90-real;100-real;120\n" in result.stdout


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (
            "75 80 86 87 88 89 90 100 110 103 120 121",
            "75-real;80;86-real;89-real;90-real;100-real;120",
        ),
        ("80 86 89 90 100 120", "80;86-real;89-real;90-real;100-real;120"),
        ("52 75 80 86 87 89 90", "75-real;80;86-real;89-real;90"),  # CUDA 11.8
        ("52 75 80", "75-real;80"),  # 11.0
        ("52 75", "75"),
    ],
)
def test_an_nvcc_is_asked_only_for_what_it_knows(known: str, expected: str, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
[ "$1" = --list-gpu-arch ] && for arch in {known}; do echo compute_$arch; done
""")
    nvcc.chmod(0o755)
    script = tmp_path / "choose.cmake"
    script.write_text(f"""
set(CMAKE_CUDA_COMPILER {nvcc})
include({ROOT / "cmake/cuda_archs.cmake"})
samkernels_choose_cuda_archs(archs)
message("${{archs}}")
""")
    result = subprocess.run(
        [sys.executable, "-m", "cmake", "-P", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == expected


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    build = ["build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "tree")]
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *build],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_build_that_fails_names_the_way_without_the_core(tmp_path: Path) -> None:
    result = run_setup(tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert result.returncode != 0
    assert "the build of the compiled core failed" in result.stdout
    assert "SAMKERNELS_CORE=OFF in the environment installs without the core" in result.stdout


def test_without_the_core_nothing_is_compiled(tmp_path: Path) -> None:
    result = run_setup(tmp_path, SAMKERNELS_CORE="OFF", CXX=str(tmp_path / "no-compiler"))
    assert result.returncode == 0, result.stdout
    assert not list(tmp_path.rglob("_C*"))


def test_an_unknown_value_for_the_core_is_an_error(tmp_path: Path) -> None:
    result = run_setup(tmp_path, SAMKERNELS_CORE="MAYBE")
    assert result.returncode != 0
    assert "SAMKERNELS_CORE is 'MAYBE': give ON or OFF." in result.stdout


def test_an_installation_without_the_core_says_why_and_works(tmp_path: Path) -> None:
    without = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "samkernels", tmp_path / "samkernels", ignore=without)
    # An editable installation would lend its core.
    report = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
runpy.run_module("samkernels", run_name="__main__")
"""
    result = subprocess.run(
        [sys.executable, "-c", report],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search("^core: *none$", result.stdout, re.MULTILINE)
    assert re.search("^native *cpu *no: .*SAMKERNELS_CORE=OFF", result.stdout, re.MULTILINE)
    assert re.search("^auto *cpu *takes foreach$", result.stdout, re.MULTILINE)


def test_the_formatters_of_pre_commit_are_those_of_the_extra() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = set(re.findall(r"\[([\w-]+==[\w.]+)\]", hooks))
    assert {pin.partition("==")[0] for pin in pins} == {"ruff", "clang-format"}
    extras = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{pin}"' in extras for pin in pins)


def test_the_changelog_knows_the_version() -> None:
    version = samkernels.__version__
    heading = "## Unreleased\n" if ".dev" in version else f"## {version}: "
    assert f"\n{heading}" in (ROOT / "CHANGELOG.md").read_text()


def test_report_names_every_backend() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "samkernels"], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("samkernels ")
    assert torch.__version__ in lines[0]
    assert native.build_info()["compiler"] in lines[1]
    for backend in ("native", "foreach", "reference"):
        assert any(line.split() == [backend, "cpu", "available"] for line in lines)
    for backend in ("native", "triton", "foreach", "reference"):
        assert any(line.startswith(backend) and " cuda " in line for line in lines)
    assert any(line.split()[:3] == ["triton", "cpu", "no:"] for line in lines)

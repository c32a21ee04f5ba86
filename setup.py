"""Builds samkernels._C with CMake; everything else is in pyproject.toml.

Environment: SAMKERNELS_CORE=ON|OFF (OFF: a package without it, in pure Python),
SAMKERNELS_CUDA=AUTO|ON|OFF, SAMKERNELS_CUDA_ARCHS="80;90",
SAMKERNELS_CXX_DEFINES="NAME=1 OTHER=2" (see CMakeLists.txt).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake for the one extension of this package."""

    def build_extension(self, ext: Extension) -> None:
        # Beside the build tree of another interpreter or of other options, not in it: a CMake cache
        # remembers both.
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        build_type = "Debug" if self.debug else "Release"
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            *_generator(),
            "--fresh",  # under build isolation Ninja and pybind11 move from run to run
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_{build_type.upper()}={target.parent}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DSAMKERNELS_CUDA={os.environ.get('SAMKERNELS_CUDA', 'AUTO')}",
            f"-DSAMKERNELS_CUDA_ARCHS={os.environ.get('SAMKERNELS_CUDA_ARCHS', '')}",
            f"-DSAMKERNELS_CXX_DEFINES={os.environ.get('SAMKERNELS_CXX_DEFINES', '')}",
        ]
        build = ["cmake", "--build", str(build_dir), "--config", build_type]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(build, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"samkernels: the build of the compiled core failed: {error}\n"
                "samkernels: it needs a C++17 compiler; what is missing stands above. "
                "SAMKERNELS_CORE=OFF in the environment installs without the core: the backends "
                "triton, foreach and reference need none."
            ) from error


def _generator() -> list[str]:
    """Ninja; Visual Studio on Windows, whose compiler Ninja finds in a developer prompt only."""
    visual_studio = sys.platform == "win32" and shutil.which("cl") is None
    return [] if visual_studio else ["-G", "Ninja"]


def _extensions() -> list[Extension]:
    core = os.environ.get("SAMKERNELS_CORE", "ON")
    if core not in ("ON", "OFF"):
        raise SystemExit(f"SAMKERNELS_CORE is {core!r}: give ON or OFF.")
    return [Extension("samkernels._C", sources=[])] if core == "ON" else []


setup(ext_modules=_extensions(), cmdclass={"build_ext": CMakeBuild})

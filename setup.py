"""Builds samkernels._C with CMake and Ninja; everything else is in pyproject.toml.

Environment: SAMKERNELS_CUDA=AUTO|ON|OFF, SAMKERNELS_CUDA_ARCHS="80;90",
SAMKERNELS_CXX_DEFINES="NAME=1 OTHER=2" (see CMakeLists.txt).
"""

import os
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
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            "--fresh",  # under build isolation Ninja and pybind11 move from run to run
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DSAMKERNELS_CUDA={os.environ.get('SAMKERNELS_CUDA', 'AUTO')}",
            f"-DSAMKERNELS_CUDA_ARCHS={os.environ.get('SAMKERNELS_CUDA_ARCHS', '')}",
            f"-DSAMKERNELS_CXX_DEFINES={os.environ.get('SAMKERNELS_CXX_DEFINES', '')}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"samkernels: the build of the compiled core failed: {error}"
            ) from error


setup(
    ext_modules=[Extension("samkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

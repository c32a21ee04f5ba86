"""What can be made before the GPU machine starts, on one that has nvcc and no GPU.

    python -m bench.gpu.prepare [--arch 90] [--variants] [--images FOLDER]

Builds the core for one architecture (without --arch, that of the GPU that is visible) and for the
Python that runs this, which has to be of the GPU machine's version, and leaves it in samkernels/.
--variants: cores with other macros into .gpu/variants.tgz. --images: class sheets of CIFAR-100
(bench/gpu/cifar.py) into .gpu/cifar100, as many as fit --megabytes; the official folder
cifar-100-python can be put there as it is. All of it is ignored by git, and has to be copied to the
machine beside the sources.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from bench.gpu.plans import CARRIED, IMAGES, VARIANTS
from bench.gpu.runner import ROOT

# Sets of macros, each on top of the defaults; in the order in which they are worth trying.
MACROS = (
    "SAMKERNELS_REVERSE_PERTURB=0",
    "SAMKERNELS_CHUNK_SIZE=16384",
    "SAMKERNELS_STREAMING=0",
    "SAMKERNELS_THREADS=512",
    "SAMKERNELS_CHUNK_SIZE=4096",
    "SAMKERNELS_THREADS=128",
    "SAMKERNELS_CHUNK_SIZE=32768",
)


def build(arch: str, folder: Path, macros: str = "") -> Path:
    """The core, stripped, built in `folder`; for the visible GPU if `arch` is empty.

    Raises:
        ValueError: the CUDA sources know none of a macro.
        subprocess.CalledProcessError: the build failed.
    """
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu*"))
    for macro in macros.split():
        if (name := macro.partition("=")[0]) not in sources:
            raise ValueError(f"the sources in csrc/cuda know no macro {name}")
    archs = f"{arch}-real" if arch else ""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += ["-DSAMKERNELS_CUDA=ON", f"-DSAMKERNELS_CUDA_ARCHS={archs}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DSAMKERNELS_CXX_DEFINES={macros}"]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    (core,) = folder.glob("_C.*.so")
    if shutil.which("strip"):
        subprocess.run(["strip", core], check=True)
    return core


def folder_of(arch: str, name: str = "core") -> Path:
    """Where it is built: apart for each architecture and version of Python."""
    return ROOT / "build" / f"{name}_{arch or 'visible'}_{sys.implementation.cache_tag}"


def build_variants(arch: str, target: Path) -> None:
    """An archive of cores, each named after its macros."""
    target.parent.mkdir(exist_ok=True)
    with tarfile.open(target, "w:gz") as tar:
        for macros in MACROS:
            name = re.sub(r"\W+", "_", macros.replace("SAMKERNELS_", "").lower())
            tar.add(build(arch, folder_of(arch, name), macros), f"{name}.so")


def gather(source: Path, target: Path, megabytes: float) -> list[str]:
    """Copy a sheet of test images, then sheets of training images, as many as fit; their names."""
    if not (source / "classes.txt").exists():
        raise SystemExit(
            f"--images={source}: there is no classes.txt, so these are no class sheets "
            "(bench/gpu/cifar.py); the official folder cifar-100-python goes into .gpu/cifar100 "
            "as it is"
        )
    target.mkdir(parents=True, exist_ok=True)
    room = 1e6 * megabytes
    sheets = [*sorted(source.glob("test-*"))[:1], *sorted(source.glob("train-*"))]
    copied = []
    for path in [source / "classes.txt", *sheets]:
        room -= path.stat().st_size
        if room < 0:
            break
        shutil.copyfile(path, target / path.name)
        copied.append(path.name)
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="", help="compute capability without the point")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--images", type=Path, help="a folder of class sheets of CIFAR-100")
    parser.add_argument("--megabytes", type=float, default=45, help="of images, at most")
    arguments = parser.parse_args()
    core = build(arguments.arch, folder_of(arguments.arch))
    installed = ROOT / "samkernels" / core.name
    shutil.copyfile(core, installed)
    made = [installed]
    if arguments.variants:
        build_variants(arguments.arch, CARRIED / VARIANTS)
        made.append(CARRIED / VARIANTS)
    if arguments.images:
        for name in gather(arguments.images, CARRIED / IMAGES, arguments.megabytes):
            made.append(CARRIED / IMAGES / name)
    for path in made:
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

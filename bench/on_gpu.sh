#!/usr/bin/env bash
# All that needs a GPU, in order of worth, within a few minutes:
#
#   bench/on_gpu.sh first FOLDER   7 minutes: right, fast, and the bytes; Triton with what time is left
#   bench/on_gpu.sh again FOLDER   4 minutes: the same, shorter, after something was mended
#   bench/on_gpu.sh cifar FOLDER   4 minutes: ResNet-18 on CIFAR-100 with SGD, SAM, SAMDirection, SAMMagnitude
#
# Every step has a cap and a log; what fails, is missing or runs over is written down, and the rest goes on. After
# every step all that is known is in FOLDER: report.md (a page of tables, then all others), report.json, evidence.tgz
# (the logs). bench/results/DEVICE/ is where results are committed. --rehearse at the end takes the same steps on a
# CPU; --seconds N sets another limit.
#
# Needs python3 (or PYTHON) with torch, triton, numpy, pytest, pytest-benchmark; compute-sanitizer and ncu for the
# steps that are about them. Takes the compiled core that lies in samkernels/ if it serves the GPU, and else builds one
# (nvcc, cmake, ninja, pybind11). SAMKERNELS_COMMIT names the commit where there is no git. No network.
# `python -m bench.gpu.prepare --arch 90 --variants`, where nvcc is and no GPU, builds that core and variants of it.
# cifar needs CIFAR-100: the official folder cifar-100-python in .gpu/cifar100.
set -euo pipefail
usage() { sed -n '2,/^set/{/^#/p}' "$0"; }
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  usage
  exit
fi
if (($# < 2)) || [[ ! $1 =~ ^(first|again|cifar)$ ]]; then
  usage >&2
  exit 2
fi
mkdir -p "$2"
folder=$(cd "$2" && pwd)
plan=$1
shift 2
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu "$plan" "$folder" "$@"

#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most eight minutes, each on its own on a bare machine:
#
#   bench/on_gpu.sh build    FOLDER   compile the core for this GPU
#   bench/on_gpu.sh test     FOLDER   the tests of ops, optimizers and backends on CUDA tensors
#   bench/on_gpu.sh sanitize FOLDER   compute-sanitizer over every op
#   bench/on_gpu.sh profile  FOLDER   DRAM bytes and throughput of every kernel (ncu)
#   bench/on_gpu.sh bench    FOLDER   one SAM step: native, eager, foreach, compiled, triton
#   bench/on_gpu.sh suite    FOLDER   all that make bench measures, for python -m bench.report
#   bench/on_gpu.sh tune     FOLDER ["NAME=VALUE ..." ...]   variants of the core, by macros
#
# FOLDER takes STAGE.json, STAGE.md and logs; bench/results/DEVICE/ is where results are committed. --dry-run at the
# end rehearses a stage on the CPU. Needs python3 (or PYTHON) with torch, triton, numpy, pybind11, pytest and
# pytest-benchmark; nvcc, cmake and ninja; compute-sanitizer and ncu for the stages that are about them. No network.
set -euo pipefail
if (($# < 2)); then
  sed -n '2,/^set/{/^#/p}' "$0" >&2
  exit 2
fi
stage=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu "$stage" "$folder" "$@"

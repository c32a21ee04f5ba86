# make quickstart   train with every optimizer on a small real data set, checked against the reference
# make test         the tests;  make check: lint, format and types;  make bench: the benchmarks
# make docs         the documentation site, in build/site; warnings are errors
# Everything runs in the virtual environment $(VENV), which is made when it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORE := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/* csrc/* csrc/*/*)
CXX_FILES := $(wildcard bench/*.cpp csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)

.PHONY: quickstart test emulation bench check docs format clean

quickstart: $(VENV)/.train
	$(BIN)/python -m train.study quickstart

test: emulation
	$(BIN)/python -m pytest

# The CUDA kernels for the host, once, before pytest starts: no test builds them.
emulation: $(VENV)/.test
	$(BIN)/python -m tests.emulated

bench: $(VENV)/.test
	mkdir -p runs/bench
	$(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
	    --benchmark-json=runs/bench/suite.json
	$(BIN)/python -m bench.report runs/bench/suite.json --output runs/bench/report.md

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

# -m, and not the script beside it: so the folder docs is found, which has an extension for Markdown.
docs: $(VENV)/.test
	$(BIN)/python -m zensical build --strict --clean

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build *.egg-info samkernels/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp for each extra of pyproject.toml; newer sources of the core build it again.
$(VENV)/.%: $(BIN)/python $(CORE)
	@echo "Installing: torch is some gigabytes, and where nvcc is found six architectures take minutes"
	@echo "(SAMKERNELS_CUDA=OFF leaves CUDA out, SAMKERNELS_CUDA_ARCHS=90 picks an architecture)."
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[$*]"
	$(BIN)/python -m samkernels
	touch $@

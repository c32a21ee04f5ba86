# make quickstart   train with every optimizer on a small real data set, checked against the reference
# make test         the tests for every day;  make test-all: the full matrix, as CI runs it
# make check        lint, format and types;  make bench: the benchmarks
# make dist         the sdist, and from it a wheel for $(PYTHON310) and one without the compiled core
# make versions     that wheel with the oldest torch that is served, and with the newest that $(PYTHON310) has
# make docs         the documentation site, in build/site; warnings are errors
# Everything runs in the virtual environment $(VENV), which is made when it is missing.

PYTHON ?= python3
PYTHON310 ?= python3.10
VENV ?= .venv
BIN := $(VENV)/bin
CORE := setup.py pyproject.toml CMakeLists.txt samkernels/_C.pyi $(wildcard cmake/* csrc/* csrc/*/*)
CXX_FILES := $(wildcard bench/*.cpp csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)

DIST := build/dist
VERSIONS := build/versions
TORCH_oldest := ==2.6.*
TORCH_newest :=
TESTS_oldest := backends.py reference.py ops.py ops_adam.py ops_sgd_hess.py optim_protocol.py optim_safety.py \
    optim_checkpoints.py optim_adam.py optim_sgdhess.py batchnorm.py
TESTS_newest := backends.py optim_protocol.py
# One thread for each of as many workers as there are cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

.PHONY: quickstart test test-rest test-all frameworks emulation dist versions version-oldest version-newest bench check docs format clean

quickstart: $(VENV)/.train
	$(BIN)/python -m train.study quickstart

test: emulation
	$(PYTEST) -m "not full"

test-all: emulation
	$(PYTEST)

# What is in test-all and not in test: in two parts.
test-rest: emulation
	$(PYTEST) -m "full and not frameworks"

frameworks: emulation
	$(PYTEST) -m "full and frameworks"

# The CUDA kernels for the host, once, before pytest starts: no test builds them.
emulation: $(VENV)/.test
	$(BIN)/python -m tests.emulated

dist: $(DIST)/.built

$(DIST)/.built: $(VENV)/.test $(CORE) MANIFEST.in README.md $(shell find samkernels -name "*.py")
	@command -v $(PYTHON310) > /dev/null || { echo "PYTHON310=$(PYTHON310): not found"; exit 1; }
	rm -rf $(DIST)
	$(BIN)/python -m build --sdist --outdir $(DIST) .
	SAMKERNELS_CUDA=OFF $(PYTHON310) -m pip wheel --quiet --disable-pip-version-check --no-deps \
	    --wheel-dir $(DIST)/core $(DIST)/*.tar.gz
	SAMKERNELS_CORE=OFF $(PYTHON310) -m pip wheel --quiet --disable-pip-version-check --no-deps \
	    --wheel-dir $(DIST)/pure $(DIST)/*.tar.gz
	touch $@

# One wheel with both, and a part of the tests; of the newest, which the others run with, what meets torch first.
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes torch without CUDA, which is much smaller.
versions: version-oldest version-newest

version-oldest version-newest: version-%: $(VERSIONS)/%/.installed
	rm -rf $(VERSIONS)/work  # tests without the sources beside them: they import what is installed
	mkdir $(VERSIONS)/work
	cp -r tests pyproject.toml $(VERSIONS)/work
	$(IN_WORK) ../$*/bin/python -m samkernels
	$(IN_WORK) ../$*/bin/python -m pytest -n auto -m "not full" $(PYTEST_ARGS) $(addprefix tests/test_,$(TESTS_$*))

IN_WORK := cd $(VERSIONS)/work && OMP_NUM_THREADS=1 SAMKERNELS_NO_EMULATION=1

$(VERSIONS)/%/.installed: $(DIST)/.built
	$(PYTHON310) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "torch$(TORCH_$*)" \
	    numpy pytest pytest-xdist hypothesis
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall $(DIST)/core/*.whl
	touch $@

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
	@echo "Installing: torch is some gigabytes, and where nvcc is found seven architectures take minutes"
	@echo "(SAMKERNELS_CUDA=OFF leaves CUDA out, SAMKERNELS_CUDA_ARCHS=90 picks an architecture)."
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[$*]"
	$(BIN)/python -m samkernels
	touch $@

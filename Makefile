# Verbs of the project. `demo`, `bench` and `test` make their own environments.
PYTHON ?= python3
RUN := .venv/bin
TEST := .venv-test/bin
# files of tests side by side; a process takes about 2 GB at most
WORKERS ?= 2
PYTEST := $(TEST)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo bench test native lint types interpreter aot exports clean

demo: .venv/ready
	$(RUN)/dualdiff demo

bench: .venv/ready
	$(RUN)/dualdiff-bench --batch 32

test: .venv-test/ready
	$(PYTEST)

# The C++ kernels, or an error; the environments build them where they can and go without elsewhere.
native: .venv-test/ready
	DUALDIFF_BUILD_NATIVE=cpu $(TEST)/python setup.py -q build_ext --inplace
	$(TEST)/python -c "from dualdiff_engine import _native; print(*_native.levels())"

# Triton kernels on a CPU: interpreted, and compiled ahead of time. Each in a process of its own.
interpreter: .venv-test/ready
	TRITON_INTERPRET=1 $(PYTEST) tests/ops/interpreter

aot: .venv-test/ready
	$(PYTEST) --dist worksteal -rP tests/ops/aot

# ONNX exports of the golden models, through ONNX Runtime on the CPU; the C++ example where its headers
# can be had
exports: .venv-test/ready
	-test -e $(TEST)/../include/onnxruntime || tests/export/headers.sh $(TEST)/../include/onnxruntime
	$(PYTEST) tests/export

lint: .venv-test/ready
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .

types: .venv-test/ready
	$(TEST)/mypy

.venv/ready: bench/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet -r bench/requirements.txt
	$(RUN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	-DUALDIFF_BUILD_NATIVE=cpu $(RUN)/python setup.py -q build_ext --inplace
	touch $@

.venv-test/ready: tests/requirements.txt bench/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-test
	$(TEST)/python -m pip install --quiet -r tests/requirements.txt
	$(TEST)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	-DUALDIFF_BUILD_NATIVE=cpu $(TEST)/python setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf .venv .venv-test build dist *.egg-info dualdiff_engine/*.so

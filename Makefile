# Verbs of the project. `demo`, `bench` and `test` make their own environments.
PYTHON ?= python3
RUN := .venv/bin
TEST := .venv-test/bin
# files of tests side by side; a process takes about 2 GB at most
WORKERS ?= 2
PYTEST := $(TEST)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo bench test faults native lint types interpreter aot exports lane-avx2 lane-sse41 lane-one-thread clean

demo: .venv/ready
	$(RUN)/dualdiff demo

bench: .venv/ready
	$(RUN)/dualdiff-bench --batch 32

test: .venv-test/ready
	$(PYTEST)

# Seeded faults, thousands of them; `make test` tries a few of each kind. Writes the record and its
# table in docs/faults.md. `DUALDIFF_FAULTS=adapter:17` tries one again.
DUALDIFF_FAULTS ?= full
faults: .venv-test/ready
	DUALDIFF_FAULTS=$(DUALDIFF_FAULTS) $(TEST)/python -m pytest -rP tests/faults
	$(TEST)/python -m dualdiff_engine.bench.readme

# The C++ kernels, or an error; the environments build them where they can and go without elsewhere.
native: .venv-test/ready
	DUALDIFF_BUILD_NATIVE=cpu $(TEST)/python setup.py -q build_ext --inplace
	$(TEST)/python -c "from dualdiff_engine import _native; print(*_native.levels())"

# The machine made a lesser one, by the limits that its libraries and the C++ kernels take. `LANE`:
# what runs there; `make lane-avx2 LANE=tests` runs all of the suite.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	DUALDIFF_NATIVE_ISA=avx2
SSE41 := ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	DUALDIFF_NATIVE_ISA=off
LANE := tests/ops tests/model tests/cli tests/test_golden.py tests/test_engine.py \
	"tests/export/test_options.py::test_float16_runs_in_an_engine" \
	"tests/export/test_options.py::test_bfloat16"

lane-avx2: .venv-test/ready
	$(AVX2) $(PYTEST) $(LANE)

lane-sse41: .venv-test/ready
	$(SSE41) $(PYTEST) $(LANE)

lane-one-thread: .venv-test/ready
	OMP_NUM_THREADS=1 taskset -c 0 $(TEST)/python -m pytest $(LANE)

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

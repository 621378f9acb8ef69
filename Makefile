# Two commands from a fresh clone: `make demo` and `make test`. Everything else is for people who change the code.
PYTHON ?= python3
VENV ?= .venv
# Pinned so that pip resolves a CPU build where one is offered; any torch >= 2.7 works.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
FUZZ_ARGS ?=
# make sanitize RECORD=1 writes what it found to tools/records.
RECORD ?=
JOBS ?= 2
# AUTO builds the CUDA kernels where nvcc is found; OFF and ON decide it.
CUDA ?= AUTO

.PHONY: help setup demo test lint format lib ops-test ops-test-emulated build/sanitize sanitize fuzz clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml custom_ops/CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[cpu,export,report,dev]"
	touch $@

setup: $(STAMP)  ## create .venv and install the package with its op library

demo: $(STAMP)  ## a real language model: export, convert, compare with onnxruntime's own int4 and int8
	$(BIN)/python tools/demo.py

test: $(STAMP) ops-test sanitize  ## everything that a machine without a GPU can check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find custom_ops -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(STAMP)  ## apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find custom_ops -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' | xargs $(BIN)/clang-format -i

lib: $(STAMP)  ## rebuild the op library in place after a change in custom_ops/
	$(BIN)/cmake -S custom_ops -B build/lib -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFPTQ_CUDA=$(CUDA)
	$(BIN)/cmake --build build/lib -j $(JOBS)
	$(BIN)/cmake --install build/lib --component python --prefix fptq_onnx

ops-test: $(STAMP)  ## C++ tests of the kernels and of the index maths of the CUDA kernels, on the CPU
	$(BIN)/cmake -S custom_ops -B build/ops-test -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFPTQ_CUDA=OFF -DFPTQ_BUILD_TESTS=ON
	$(BIN)/cmake --build build/ops-test -j $(JOBS)
	$(BIN)/ctest --test-dir build/ops-test --output-on-failure

ops-test-emulated: ops-test  ## the kernel tests on processors that are not here (needs qemu-user and g++-aarch64-linux-gnu)
	for cpu in Nehalem Haswell; do qemu-x86_64 -cpu $$cpu build/ops-test/tests/cpu/fptq_cpu_test 40 || exit 1; done
	$(BIN)/cmake -S custom_ops -B build/ops-test-aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFPTQ_CUDA=OFF -DFPTQ_BUILD_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/ops-test-aarch64 -j $(JOBS) --target fptq_cpu_test
	for cpu in max cortex-a53; do qemu-aarch64 -cpu $$cpu build/ops-test-aarch64/tests/cpu/fptq_cpu_test 60 || exit 1; done

build/sanitize: $(STAMP)
	$(BIN)/cmake -S custom_ops -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFPTQ_CUDA=OFF -DFPTQ_BUILD_TESTS=ON -DFPTQ_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize -j $(JOBS)

sanitize: build/sanitize  ## the same under Address- and UndefinedBehaviorSanitizer, concurrent sessions under ThreadSanitizer
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --output-junit $(CURDIR)/build/sanitize/results.xml
	$(BIN)/cmake -S custom_ops -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFPTQ_CUDA=OFF -DFPTQ_BUILD_TESTS=ON -DFPTQ_SANITIZE=thread
	$(BIN)/cmake --build build/tsan -j $(JOBS) --target fptq_concurrency_test
	$(BIN)/ctest --test-dir build/tsan --output-on-failure -R concurrency --output-junit $(CURDIR)/build/tsan/results.xml
	$(if $(RECORD),$(BIN)/python tools/record_sanitizers.py address+undefined=build/sanitize/results.xml thread=build/tsan/results.xml)

fuzz: build/sanitize  ## a million random nodes and thousands of random sessions against the sanitized op library; writes a record
	$(BIN)/python tools/fuzz_ops.py build/sanitize $(FUZZ_ARGS)

clean:  ## remove build products (not .venv, not the model cache)
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

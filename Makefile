# `make demo` and `make test` set up everything they need in .venv. Overridable: PYTHON, VENV, TORCH (a requirement, used
# only where the environment has no torch yet), PYTEST_FLAGS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?=

RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.pyard-installed
LINTERS := $(VENV)/.pyard-linters
# All pins but torch's own: a TORCH of another version, or one that was there before, must not conflict with it.
PINS := $(VENV)/.pyard-pins.txt
# Where the first installation has brought everything, only what changed in C++ is left to do.
REBUILD := --no-deps --no-build-isolation
NATIVE_SOURCES := $(shell find csrc -type f)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard build_backend/*.py cmake/*.cmake) $(NATIVE_SOURCES)
FUZZ_CXX ?= clang++
FUZZ_SECONDS ?= 60
FUZZ_SOURCES := $(addprefix csrc/trajectory/,fuzz_shard.cpp shard.cpp json.cpp)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE_SOURCES)) $(wildcard examples/*.cpp examples/*.h)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-t2i web wheels docs test lint fuzz crash sanitize torch-headers oldest-torch gpu-carry format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /: /' | sort

install: $(INSTALLED) ## Create .venv and install pyard in it, built against the torch that is there

demo: $(INSTALLED) ## Distil real digits into an ONNX student and draw them (minutes on two cores)
	@$(RUN) pyard demo

demo-t2i: $(INSTALLED) ## Distil a text-to-image teacher, and measure how well its students follow prompts (minutes on two cores)
	@$(RUN) pyard demo --text

# A file of the form `step`; if none is named, a student of `make demo`, which runs first where it has not.
STUDENT ?= build/web/digits.onnx
PORT ?= 8080
BROWSER := examples/browser
web: $(STUDENT) $(BROWSER)/node_modules/.package-lock.json ## Draw in the browser, on localhost (STUDENT=step.onnx PORT=8080; needs npm)
	@$(PYTHON) $(BROWSER)/serve.py $(STUDENT) --port $(PORT)

build/web/digits.onnx: | $(INSTALLED)
	@test -f demo/ard/student/config.json || $(RUN) pyard demo
	@mkdir -p $(@D)
	@$(RUN) pyard.export --onnx $@ --student demo/ard --form step

$(BROWSER)/node_modules/.package-lock.json: $(BROWSER)/package-lock.json
	@npm ci --ignore-scripts --omit=dev --no-audit --no-fund --prefix $(BROWSER)
	@touch $@

# torch is asked for by the wheel's metadata, not copied into it. What earlier builds left in build/lib would get in, too.
wheels: $(INSTALLED) ## Build the wheels of pyard-distill and pyard-runtime in dist/, on Linux with a manylinux tag
	@rm -rf build/lib* build/bdist* build/wheels runtime/build
	@PYARD_NATIVE=1 PYARD_CUDA=0 $(RUN) pip wheel -q --no-deps --no-build-isolation -w build/wheels . ./runtime
	@mkdir -p dist && cp build/wheels/pyard_runtime-*.whl dist
	@if [ "$$(uname)" = Linux ]; then PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		-w dist build/wheels/pyard_distill-*.whl; else cp build/wheels/pyard_distill-*.whl dist; fi
	@ls -l dist

# The extra `docs` of pyproject.toml, without building pyard again.
DOCS_TOOLS := 'mkdocs-material>=9.7' 'mkdocstrings[python]>=1.0' 'nbclient>=0.10' 'ipykernel>=6.29'
docs: $(INSTALLED) ## Build the documentation as a site, in build/site
	@$(VENV)/bin/python -c 'import material, mkdocstrings, nbclient, ipykernel' 2>/dev/null \
		|| $(RUN) pip install -q -c $(PINS) $(DOCS_TOOLS)
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build -q --strict
	@echo "build/site/index.html"

test: $(INSTALLED) ## Run the tests, a process for each core (PYTEST_FLAGS="-m slow" for the long ones)
	@$(RUN) pytest -n auto --dist worksteal $(PYTEST_FLAGS)

lint: $(LINTERS) ## Check style, types and layers: ruff, mypy, import-linter, clang-format
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@$(VENV)/bin/lint-imports --no-logo
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

fuzz: build/fuzz_shard ## Fuzz the shard parser under AddressSanitizer for FUZZ_SECONDS (needs clang)
	@mkdir -p build/fuzz_corpus
	@$< -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=5 -verbosity=0 -print_final_stats=1 -artifact_prefix=build/ \
		-dict=csrc/trajectory/fuzz_shard.dict build/fuzz_corpus csrc/trajectory/fuzz_corpus

build/fuzz_shard: $(FUZZ_SOURCES) $(wildcard csrc/trajectory/*.h)
	@mkdir -p build
	@$(FUZZ_CXX) -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc $(FUZZ_SOURCES) -o $@

CRASH_FLAGS ?= --trials 500 --jobs 2
crash: $(INSTALLED) ## Stop commands at random moments, cut power, fill disks, fail reads, start them twice: nothing may be lost (CRASH_FLAGS)
	@$(RUN) benchmarks.crash $(CRASH_FLAGS)

# A copy of the package with a library of its own; PYTHONPATH leads to it. gcc's runtimes must be loaded before Python.
SANITIZED := build/sanitized
SANITIZER_TESTS := $(addprefix python_tests/ops/test_,block_attention.py elementwise.py modulated_layer_norm.py)
SANITIZER_ENV = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	PYARD_NATIVE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED)/package

sanitize: $(INSTALLED) ## Run the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer (needs gcc)
	@PATH="$(abspath $(VENV))/bin:$$PATH" && cmake -S . -B $(SANITIZED) -G Ninja -DPYARD_SANITIZE=ON -DCMAKE_CXX_COMPILER=g++ \
		-DPYARD_TORCH_DIR=$$($(VENV)/bin/python -c 'import torch; print(torch.__path__[0])') > /dev/null
	@PATH="$(abspath $(VENV))/bin:$$PATH" && cmake --build $(SANITIZED) --target pyard_ops
	@mkdir -p $(SANITIZED)/package
	@cp -r pyard $(SANITIZED)/package
	@cp $(SANITIZED)/libpyard_ops.* $(SANITIZED)/package/pyard
	@$(SANITIZER_ENV) $(VENV)/bin/python -P -c 'from pyard.ops.backend import library; assert "$(SANITIZED)" in str(library.path)'
	@$(SANITIZER_ENV) $(VENV)/bin/python -P -m pytest -q -p no:cacheprovider $(SANITIZER_TESTS)
	@narrower=$$($(SANITIZER_ENV) $(VENV)/bin/python -P -c 'from pyard.ops.backend import library; print(*library.instruction_sets[:-1])') \
		&& for isa in $$narrower; do $(SANITIZER_ENV) PYARD_CPU_ISA=$$isa $(VENV)/bin/python -P -m pytest -q -p no:cacheprovider \
		$(SANITIZER_TESTS) -k "exact or closed_form or takes_rows or rounds" || exit 1; done

# One library serves every torch from this one on, so it must compile against the headers of this one. Its CUDA kernels are for
# Hopper alone: so it is what benchmarks/GPU.md takes to a GPU machine.
OLDEST_TORCH := 2.11.0
OLDEST := build/oldest-torch
HOPPER := TORCH_CUDA_ARCH_LIST=9.0
torch-headers: $(INSTALLED) ## Download the headers of the oldest supported torch
	@$(VENV)/bin/python build_backend/torch_headers.py $(OLDEST_TORCH) build/torch-$(OLDEST_TORCH)

oldest-torch: torch-headers ## Build the operators against those headers, with CUDA kernels where there is nvcc, and test them
	@PATH="$(abspath $(VENV))/bin:$$PATH" && $(HOPPER) cmake -S . -B $(OLDEST) -G Ninja \
		-DPYARD_TORCH_INCLUDE=$(CURDIR)/build/torch-$(OLDEST_TORCH)/torch/include \
		-DPYARD_TORCH_LIB=$$($(VENV)/bin/python -c 'import torch; print(torch.__path__[0])')/lib \
		-DPYARD_CUDA=$$(command -v $${CUDACXX:-nvcc} > /dev/null && echo ON || echo OFF) > /dev/null
	@PATH="$(abspath $(VENV))/bin:$$PATH" && $(HOPPER) cmake --build $(OLDEST) --target pyard_ops > $(OLDEST)/build.log \
		|| { grep -v 'ptxas info' $(OLDEST)/build.log | tail -n 40; exit 1; }
	@PYARD_PREBUILT=$(OLDEST)/libpyard_ops.so $(RUN) pytest -q -p no:cacheprovider python_tests/ops/test_library.py \
		python_tests/ops/test_elementwise.py

# What benchmarks/GPU.md takes to a GPU machine. The trajectory reader is made for that machine's Python, if GPU_PYTHON names one of
# the same version; otherwise it is built there.
GPU_PYTHON ?=
CARRY := build/gpu-carry
gpu-carry: oldest-torch ## Build what is carried to a GPU machine into build/gpu-carry (GPU_PYTHON=python3.12, needs nvcc)
	@PATH="$(abspath $(VENV))/bin:$$PATH" && $(HOPPER) cmake -S . -B $(OLDEST) \
		-DPYARD_PYBIND11_INCLUDE=$$($(VENV)/bin/python -c 'import pybind11; print(pybind11.get_include())') \
		$(if $(GPU_PYTHON),-DPYARD_PYTHON_INCLUDE=$$($(GPU_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')) \
		> /dev/null
	@PATH="$(abspath $(VENV))/bin:$$PATH" && $(HOPPER) cmake --build $(OLDEST) --target pyard_gpu_sanitize $(if $(GPU_PYTHON),pyard_trajectory) \
		> $(OLDEST)/build.log || { grep -v 'ptxas info' $(OLDEST)/build.log | tail -n 40; exit 1; }
	@rm -rf $(CARRY) && mkdir -p $(CARRY)
	@$(RUN) pip install -q -c $(PINS) --no-deps --no-compile --target $(CARRY)/site diffusers
	@cp $(OLDEST)/libpyard_ops.so $(OLDEST)/pyard_gpu_sanitize $(CARRY)
	@$(if $(GPU_PYTHON),cp $(OLDEST)/_trajectory.so $(CARRY)/_trajectory$$($(GPU_PYTHON) -c \
		'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'))
	@ls -l $(CARRY)

format: $(LINTERS) ## Format Python and C++ in place
	@$(RUN) ruff check --fix
	@$(RUN) ruff format
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## Remove what was built (not .venv)
	rm -rf build dist *.egg-info runtime/build runtime/*.egg-info $(BROWSER)/node_modules pyard/libpyard_ops.* pyard/_trajectory.* pyard/_build.json
	rm -f $(INSTALLED) $(LINTERS)

$(INSTALLED): $(BUILD_INPUTS)
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@grep -v '^torch==' constraints.txt > $(PINS)
	@$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(RUN) pip install -c $(PINS) $(TORCH)
	@$(RUN) pip install -q -c $(PINS) $(if $(filter pyproject.toml constraints.txt,$?),,$(REBUILD)) -e '.[test,train,lora,native,wheels]'
	@touch $@

$(LINTERS): $(INSTALLED)
	@$(RUN) pip install -q -c $(PINS) -e '.[dev]'
	@touch $@

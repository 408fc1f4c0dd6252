#!/usr/bin/env bash
# Builds, tests, checks and measures the CUDA kernels on a bare CUDA machine: Python 3.11+, torch 2.11+ with CUDA, numpy,
# pytest, cmake, ninja, nvcc, no network. Every step has a time limit of its own, so that one hang does not cost the rest,
# and all of them together end within nine minutes. Results: benchmarks/results/<device>.json and .md; logs in
# $GPU_CHECK_LOGS.
#   benchmarks/gpu_check.sh              on a GPU
#   benchmarks/gpu_check.sh --build      build alone: no GPU needed
#   benchmarks/gpu_check.sh --cpu-smoke  no build, no GPU: does every line of the benchmarks run?
# PYARD_PREBUILT=libpyard_ops.so, a library that was built elsewhere against another torch: is it taken here?
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOGS=${GPU_CHECK_LOGS:-build/gpu_check}
ARCH=${ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)}
ARCH=${ARCH:-9.0}
PREBUILT=${PYARD_PREBUILT:-}
RESULTS=benchmarks/results
BENCH=(--device cuda)
if [[ ${1:-} == --cpu-smoke ]]; then
  BENCH=(--device cpu --smoke)
  RESULTS=$LOGS/results
fi
END=$((SECONDS + 525)) # of the last step; the table takes seconds
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
rm -rf "$LOGS" && mkdir -p "$LOGS"

# step NAME SECONDS COMMAND...: its output in a log, its result in steps.tsv.
step() {
  local name=$1 limit=$2 start=$SECONDS result=ok code=0
  shift 2
  if ((limit > END - SECONDS)); then limit=$((END - SECONDS)); fi
  if ((limit < 5)); then
    printf '%s\t0\tleft out: no time\n' "$name" >>"$LOGS/steps.tsv"
    return 1
  fi
  echo "== $name (at most $limit s)"
  timeout --kill-after=3 "$limit" "$@" >"$LOGS/$name.log" 2>&1 || code=$?
  if ((code == 124 || code == 137)); then result="no end within $limit s"; elif ((code != 0)); then result="failed ($code)"; fi
  printf '%s\t%s\t%s\n' "$name" $((SECONDS - start)) "$result" >>"$LOGS/steps.tsv"
  tail -n 12 "$LOGS/$name.log"
  echo "== $name: $result, $((SECONDS - start)) s"
  return "$code"
}

# The names are what a process may have mapped: files are replaced, never written into.
install_library() { cp "$1" pyard/libpyard_ops.so.new && mv pyard/libpyard_ops.so.new pyard/libpyard_ops.so; }

build() {
  local torch_dir
  torch_dir=$("$PYTHON" -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parent)')
  # Several threads for one file, too: GPU machines are paid for by the minute.
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$ARCH} NVCC_APPEND_FLAGS=--split-compile=0
  cmake -S . -B build/gpu -G Ninja -DPYARD_TORCH_DIR="$torch_dir" -DPYARD_CUDA=ON &&
    cmake --build build/gpu --parallel "${MAX_JOBS:-$(nproc)}" --target pyard_ops pyard_gpu_sanitize &&
    install_library build/gpu/libpyard_ops.so
}

prebuilt() { # the library of another machine and another torch: does it load, and do its kernels answer?
  install_library "$PREBUILT" &&
    "$PYTHON" -c 'import torch, pyard.ops.backend as b; print("running torch", torch.__version__, b.library)' &&
    "$PYTHON" -m pytest -q -m 'cuda and not slow' -p no:cacheprovider python_tests/ops/test_cuda.py
}

sanitize() { # memcheck, racecheck or initcheck over every kernel at small, ragged sizes
  compute-sanitizer --tool "$1" --error-exitcode 9 build/gpu/pyard_gpu_sanitize
}

export -f build prebuilt sanitize install_library
export PYTHON ARCH PREBUILT
if [[ ${1:-} == --build ]]; then
  build
  exit
fi
if [[ ${1:-} != --cpu-smoke ]]; then
  export PYARD_REQUIRE_CUDA=1
  if [[ -n $PREBUILT ]]; then step prebuilt 30 bash -c prebuilt || true; fi
  step build 110 bash -c build || echo "nothing to check without a library"
  step memcheck 25 bash -c 'sanitize memcheck' || true
  step racecheck 30 bash -c 'sanitize racecheck' || true
  step initcheck 25 bash -c 'sanitize initcheck' || true
  step tests 80 "$PYTHON" -m pytest -q -m 'cuda and not slow' -p no:cacheprovider \
    python_tests/ops/test_cuda_kernels.py python_tests/ops/test_cuda.py python_tests/ops/test_attention_backends.py || true
fi
step operators 90 "$PYTHON" -m benchmarks.gpu_operators "${BENCH[@]}" --out "$LOGS/bench" || true
step models 130 "$PYTHON" -m benchmarks.gpu_models "${BENCH[@]}" --out "$LOGS/bench" || true
"$PYTHON" -m benchmarks.gpu_table "$LOGS" "$RESULTS"
! grep -qv $'\tok$' "$LOGS/steps.tsv"

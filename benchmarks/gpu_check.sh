#!/usr/bin/env bash
# Builds, tests, checks and measures the CUDA kernels on a bare CUDA machine: Python 3.11+, torch 2.11+ with CUDA, pytest,
# cmake, ninja, nvcc, no network. Every step has a time limit of its own, so that one hang does not cost the rest; all of
# them together end within nine minutes. Results: benchmarks/results/<device>.json and .md; logs in $GPU_CHECK_LOGS.
#   benchmarks/gpu_check.sh              on a GPU
#   benchmarks/gpu_check.sh --cpu-smoke  no build, no GPU: does every line of the benchmarks run?
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOGS=${GPU_CHECK_LOGS:-build/gpu_check}
ARCH=${ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)}
RESULTS=benchmarks/results
BENCH=(--device cuda)
if [[ ${1:-} == --cpu-smoke ]]; then
  BENCH=(--device cpu --smoke)
  RESULTS=$LOGS/results
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
rm -rf "$LOGS" && mkdir -p "$LOGS"

# step NAME SECONDS COMMAND...: its output in a log, its result in steps.tsv.
step() {
  local name=$1 limit=$2 start=$SECONDS result=ok code=0
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$LOGS/$name.log" 2>&1 || code=$?
  if ((code == 124 || code == 137)); then result="no end within $limit s"; elif ((code != 0)); then result="failed ($code)"; fi
  printf '%s\t%s\t%s\n' "$name" $((SECONDS - start)) "$result" >>"$LOGS/steps.tsv"
  tail -n 12 "$LOGS/$name.log"
  echo "== $name: $result, $((SECONDS - start)) s"
  return "$code"
}

build() {
  local torch_dir
  torch_dir=$("$PYTHON" -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parent)')
  # All cores for every file: a machine is lent by the minute.
  export TORCH_CUDA_ARCH_LIST=${ARCH:-9.0} NVCC_APPEND_FLAGS=--split-compile=0
  cmake -S . -B build/gpu -G Ninja -DPYARD_TORCH_DIR="$torch_dir" -DPYARD_CUDA=ON &&
    cmake --build build/gpu &&
    cp build/gpu/libpyard_ops.so pyard/libpyard_ops.so &&
    nvcc -std=c++17 -O2 -arch="sm_${ARCH//./}" -Icsrc/cuda -Icsrc/cuda/ptx benchmarks/gpu_sanitize.cu \
      build/gpu/CMakeFiles/pyard_ops.dir/csrc/cuda/*.cu.o -o build/gpu/sanitize
}

sanitize() { # memcheck, racecheck or initcheck over every kernel at small, ragged sizes
  compute-sanitizer --tool "$1" --error-exitcode 9 build/gpu/sanitize
}

export -f build sanitize
export PYTHON ARCH
if [[ $RESULTS == benchmarks/results ]]; then
  step build 120 bash -c build || { echo "nothing to check without a library"; }
  step memcheck 30 bash -c 'sanitize memcheck' || true
  step racecheck 30 bash -c 'sanitize racecheck' || true
  step initcheck 30 bash -c 'sanitize initcheck' || true
  PYARD_REQUIRE_CUDA=1 step tests 90 "$PYTHON" -m pytest -q -m 'cuda and not slow' -p no:cacheprovider \
    python_tests/ops/test_cuda_kernels.py python_tests/ops/test_cuda.py || true
fi
step operators 90 "$PYTHON" -m benchmarks.gpu_operators "${BENCH[@]}" --out "$LOGS/bench" || true
step models 140 "$PYTHON" -m benchmarks.gpu_models "${BENCH[@]}" --out "$LOGS/bench" || true
"$PYTHON" -m benchmarks.gpu_table "$LOGS" "$RESULTS"
! grep -qv $'\tok$' "$LOGS/steps.tsv"

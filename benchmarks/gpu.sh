#!/usr/bin/env bash
# Builds, tests and times the CUDA backend on a machine with an NVIDIA GPU.
#
#   benchmarks/gpu.sh FOLDER          all stages, under 10 minutes
#   benchmarks/gpu.sh FOLDER first    build and tests alone, under 3 minutes
#
# Needs python3 with torch, triton, pybind11 and pytest, and nvcc, cmake and ninja; no network and no
# installation; peers are timed where they are installed. Logs and results go to FOLDER, a short table
# is printed last. A stage that fails does not stop the others, but the exit status tells.
set -uo pipefail

if [ $# -lt 1 ] || { [ $# -ge 2 ] && [ "$2" != first ]; }; then
  echo "usage: $0 FOLDER [first]" >&2
  exit 2
fi
root="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"
only_first="${2:-}"
cd "$root" || exit 2

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
  echo "gpu.sh: there is no NVIDIA GPU here (nvidia-smi finds none)" >&2
  exit 1
fi
for tool in python3 nvcc cmake ninja; do
  if ! command -v "$tool" >/dev/null; then
    [ "$tool" = nvcc ] && [ -x /usr/local/cuda/bin/nvcc ] && PATH="/usr/local/cuda/bin:$PATH" && continue
    echo "gpu.sh: $tool is missing" >&2
    exit 1
  fi
done
if ! python3 -c 'import torch, pybind11, pytest; assert torch.cuda.is_available()'; then
  echo "gpu.sh: python3 needs pybind11, pytest and a torch that sees the GPU" >&2
  exit 1
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
KDKERNELS_COMMIT="${KDKERNELS_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
export KDKERNELS_COMMIT
unset KDKERNELS_CUDA_TILE
summary=()
failed=0

# stage NAME SECONDS COMMAND...: its output in FOLDER/NAME.log, its outcome in the table.
stage() {
  local name="$1" limit="$2" start=$SECONDS status
  shift 2
  printf '== %s\n' "$name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  local outcome="ok"
  [ $status -eq 124 ] && outcome="stopped after $limit s"
  [ $status -ne 0 ] && [ $status -ne 124 ] && outcome="failed ($status)"
  [ $status -ne 0 ] && failed=1 && tail -n 15 "$out/$name.log"
  summary+=("$(printf '%-16s %4d s  %s' "$name" $((SECONDS - start)) "$outcome")")
  return $status
}

# timed NAME SECONDS OPTION...: a run of the benchmarks that ends by itself; results in FOLDER/NAME.*
timed() {
  local name="$1" budget="$2"
  shift 2
  # One pool that grows: tensors of gigabytes and many sizes leave no holes.
  stage "$name" $((budget + 18)) env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    python3 -m benchmarks --device cuda --budget "$budget" --output "$out/$name" "$@"
}

capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)"
{
  nvidia-smi
  nvcc --version
  python3 -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  python3 -c 'import triton; print("triton", triton.__version__)'
  echo "commit $KDKERNELS_COMMIT"
} >"$out/machine.log" 2>&1

build() {
  cmake -S . -B "$out/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKDKERNELS_CUDA=ON \
    -DPython_EXECUTABLE="$(python3 -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" \
    -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/kdkernels" &&
    cmake --build "$out/build" --target _C
}

run_stages() {
  stage build 90 bash -c build || return
  python3 -c 'import sys; from kdkernels import _C; reason = _C.cuda_why_not(0); sys.exit(reason or 0)' ||
    { failed=1; return; }
  stage tests 90 python3 -m pytest -q --maxfail=30 -p no:cacheprovider -k cuda \
    --junitxml="$out/tests.xml"
  [ "$only_first" = first ] && return

  sanitizer="$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)"
  if [ -x "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck; do
      stage "$tool" 45 "$sanitizer" --tool "$tool" --error-exitcode 3 python3 -m benchmarks.gpu check
    done
  else
    summary+=("sanitizers       skipped: there is no compute-sanitizer")
  fi
  stage check 20 python3 -m benchmarks.gpu check
  ours=(kdkernels-cuda kdkernels-triton)
  timed gpu 40 --dtype bfloat16 --shapes 128256 --rounds 15 \
    --providers "${ours[@]}" kdkernels-cuda-in-place eager torch.compile peers
  timed gpu_vocabs 20 --dtype bfloat16 --shapes 32000 151936 50257 256000 \
    --providers "${ours[@]}" kdkernels-cuda-in-place eager peers
  timed gpu_divergences 25 --dtype bfloat16 --shapes 128256 32000 --divergence all \
    --providers "${ours[@]}"
  timed gpu_float32 15 --dtype float32 --shapes 128256 32000 50257 151936 256000 --rows 4096 \
    --divergence forward_kl jsd --providers "${ours[@]}"
  timed gpu_linear 20 --level linear --dtype bfloat16 --shapes llama3 qwen3 gemma3 --rounds 5 \
    --providers kdkernels eager peers
  stage tune 40 python3 -m benchmarks.gpu tune --budget 30 --output "$out/tiles.json"
}
export -f build  # for the shell that timeout runs
export out root capability
run_stages

echo
for log in gpu gpu_vocabs gpu_divergences gpu_float32 gpu_linear tune; do
  [ -s "$out/$log.log" ] && printf '== %s\n' "$log" && cat "$out/$log.log"
done
echo "== stages"
printf '%s\n' "${summary[@]}"
tail -n 1 "$out/tests.log" 2>/dev/null
exit $failed

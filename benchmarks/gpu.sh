#!/usr/bin/env bash
# Builds, tests and times the CUDA backend on a machine with an NVIDIA GPU.
#
#   benchmarks/gpu.sh FOLDER          build, tests, sanitizers and times, under 9 minutes
#   benchmarks/gpu.sh FOLDER first    build, tests and sanitizers alone, under 4 minutes
#   benchmarks/gpu.sh FOLDER times    build and times alone, under 8 minutes
#   benchmarks/gpu.sh FOLDER tune     build and every tile beside the chosen one, under 8 minutes
#
# Needs python3 with torch, triton, pybind11 and pytest, and nvcc, cmake and ninja; no network and no
# installation; tests run in parallel where pytest-xdist is installed, peers are timed where they are.
# Logs and results go to FOLDER, a short table is printed last. A stage that fails does not stop the
# others, but the exit status tells.
set -uo pipefail

only="${2:-}"
if [ $# -lt 1 ] || [[ ! $only =~ ^(first|times|tune)?$ ]]; then
  echo "usage: $0 FOLDER [first|times|tune]" >&2
  exit 2
fi
root="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"
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

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
KDKERNELS_COMMIT="${KDKERNELS_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
export KDKERNELS_COMMIT
unset KDKERNELS_CUDA_TILE
started=$(($(date +%s) - SECONDS))
summary=()
failed=0

# start NAME SECONDS COMMAND...: in the background, its output in FOLDER/NAME.log. Interrupted at its
# limit, so that pytest still says what it knows; it gives workers that hang 10 seconds before.
declare -A pids begins limits
start() {
  local name="$1" limit="$2" grace=5
  [[ $name == tests_* ]] && grace=15
  shift 2
  printf '== %s\n' "$name"
  begins[$name]=$SECONDS limits[$name]=$limit
  {  # what a shell starts in the background ignores interrupts, unless told otherwise
    timeout --signal=INT --kill-after="$grace" "$limit" env --default-signal=INT "$@"
    echo $? >"$out/$name.status"
    date +%s >"$out/$name.end"
  } >"$out/$name.log" 2>&1 &
  pids[$name]=$!
}

# last LINES LOG: of pytest's up to its summary. Its workers say after it where they were interrupted.
last() {
  sed -E '/^[0-9]+ [a-z]+.* in [0-9.]+s/q' "$2" | tail -n "$1"
}

# finish NAME: waits for it; its outcome in the table.
finish() {
  local name="$1" status outcome="ok"
  wait "${pids[$name]}"
  status="$(cat "$out/$name.status" 2>/dev/null || echo 1)"
  local seconds=$(($(cat "$out/$name.end") - started - begins[$name]))
  rm -f "$out/$name.status" "$out/$name.end"
  [ "$status" -eq 0 ] || outcome="failed ($status)"
  [ "$status" -eq 124 ] || [ "$status" -eq 137 ] && outcome="stopped after ${limits[$name]} s"
  [ "$status" -ne 0 ] && failed=1 && last 15 "$out/$name.log"
  summary+=("$(printf '%-16s %4d s  %s' "$name" "$seconds" "$outcome")")
  return "$status"
}

stage() {
  start "$@"
  finish "$1"
}

# timed NAME SECONDS OPTION...: a run of the benchmarks that ends by itself; results in FOLDER/NAME.json
timed() {
  local name="$1" budget="$2"
  shift 2
  stage "$name" $((budget + 15)) env PYTORCH_CUDA_ALLOC_CONF="$allocator" \
    python3 -m benchmarks --device cuda --budget "$budget" --output "$out/$name.json" "$@"
}

# Of the device that torch calls the first; nvidia-smi may count in another order.
capability="$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' || true)"
{
  nvidia-smi
  nvcc --version
  echo "commit $KDKERNELS_COMMIT"
} >"$out/machine.log" 2>&1

build() {
  python3 -c 'import sys, pybind11, pytest, torch
print(sys.version, "torch", torch.__version__, "CUDA", torch.version.cuda)
assert torch.cuda.is_available(), "torch sees no GPU"' &&
    cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DKDKERNELS_CUDA=ON \
      -DPython_EXECUTABLE="$(python3 -c 'import sys; print(sys.executable)')" \
      -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" \
      -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
      -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/kdkernels" &&
    cmake --build build/gpu --target _C &&
    python3 -c 'import sys; from kdkernels import _C; sys.exit(_C.cuda_why_not(0) or 0)'
}

# tests_of BACKEND SECONDS EXPRESSION...: in the background, the tests whose names it is true of.
tests_of() {
  local name="tests_$1" limit="$2" options=()
  shift 2
  python3 -c 'import xdist' 2>/dev/null && options=(--numprocesses 8 --dist loadgroup)
  options+=(--ignore=tests/test_peft.py)  # to collect it is to import frameworks
  # Nice to the build, which all but Triton's tests wait for.
  start "$name" "$limit" nice -n 19 python3 -m pytest -q --maxfail=50 -p no:cacheprovider "${options[@]}" \
    -o faulthandler_timeout=40 -k "$*" --junitxml="$out/$name.xml"  # says where a test hangs
}

# Tests of the CUDA backend beside the sanitizers: nothing is timed.
checks() {
  local tools=() tool limit=80
  # Shards and sparse teachers have one kind of CUDA kernel.
  tests_of cuda "$limit" "(cuda or gpu) and not (triton or registered or spills)" \
    "and not (streaming and (sharded or sparse))"
  local sanitizer
  sanitizer="$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)"
  if [ -x "$sanitizer" ]; then
    tools=(memcheck racecheck synccheck initcheck)
    for tool in "${tools[@]}"; do
      # It would give up on a process that imports torch for longer than 10 seconds, and count calls
      # by which PyTorch asks what a driver has. Ours raise where they fail.
      local options=(--launch-timeout 0 --report-api-errors no)
      # Shared memory and barriers of our own kernels only, by a part of their mangled names.
      case $tool in racecheck | synccheck) options+=(--kernel-regex kns=2kd4cuda) ;; esac
      # A tensor is an allocation then, not a part of a pool: what lies beside it is out of bounds.
      start "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
        "${options[@]}" --error-exitcode 3 python3 -m benchmarks.gpu check
    done
  else
    summary+=("sanitizers       skipped: there is no compute-sanitizer")
  fi
  for tool in tests_cuda "${tools[@]}"; do
    finish "$tool"
  done
}

# Compiles what Triton will be timed with into its cache, beside the build, not in timed budgets.
compile_triton() {
  local divergence
  for divergence in $(python3 -c 'from kdkernels.divergences import DIVERGENCES; print(*DIVERGENCES)'); do
    python3 -m benchmarks --device cuda --rows 128 --rounds 1 --dtype bfloat16 float32 --shapes $vocabs \
      --divergence "$divergence" --providers kdkernels-triton &
  done
  wait
}

run_stages() {
  # These need no extension, and compile more than a thousand kernels, over ten minutes of one core's
  # time: the build and the checks of CUDA go on beside them.
  local built=0
  case $only in
    '' | first) tests_of triton 160 "(triton or registered) and not spills" ;;
    times) start compile_triton 100 nice -n 19 bash -c compile_triton ;;
  esac
  stage build 110 bash -c build && built=1
  case $only in
    '' | first)
      [ $built = 0 ] || checks
      finish tests_triton
      ;;
    times) finish compile_triton ;;
  esac
  [ $built = 0 ] || [ "$only" = first ] && return
  # One pool that grows: tensors of gigabytes and many sizes leave no holes. Not every machine can.
  allocator=expandable_segments:True
  PYTORCH_CUDA_ALLOC_CONF=$allocator timeout 10 python3 -c 'import torch
torch.ones(2**24, device="cuda")' >>"$out/machine.log" 2>&1 || allocator=
  if [ "$only" = tune ]; then
    stage tune 320 env PYTORCH_CUDA_ALLOC_CONF="$allocator" \
      python3 -m benchmarks.gpu tune --budget 300 --vocab $vocabs --output "$out/tune.json"
    return
  fi
  local ours=(kdkernels-cuda kdkernels-triton)
  timed gpu 100 --dtype bfloat16 float32 --shapes $vocabs --rounds 11 \
    --providers "${ours[@]}" kdkernels-cuda-in-place eager torch.compile peers
  timed gpu_divergences 65 --dtype bfloat16 float32 --shapes $vocabs --divergence all \
    --rounds 7 --providers "${ours[@]}" eager peers
  timed gpu_linear 25 --level linear --dtype bfloat16 --shapes llama3 qwen3 gemma3 --rounds 5 \
    --providers kdkernels eager peers
  timed gpu_sparse 25 --level sparse --dtype bfloat16 --shapes 128256 32000 --rounds 7 \
    --providers kdkernels-cuda kdkernels-triton kdkernels-cuda-in-place eager torch.compile
  timed gpu_close 12 --close --dtype bfloat16 --shapes 128256 --rounds 7 \
    --divergence forward_kl reverse_kl jsd --providers "${ours[@]}" eager
}
export -f build compile_triton  # for the shell that timeout runs
export vocabs="128256 32000 151936 256000 50257"
export out root capability
run_stages

echo
results=()
for name in gpu gpu_divergences gpu_linear gpu_sparse gpu_close; do
  [ -s "$out/$name.json" ] && results+=("$out/$name.json")
done
[ ${#results[@]} -gt 0 ] && timeout 15 python3 -m benchmarks.gpu table "${results[@]}" | tee "$out/table.txt"
echo "== stages, $SECONDS s"
printf '%s\n' "${summary[@]}"
for log in "$out"/tests_*.log; do
  [ -f "$log" ] && last 1 "$log"
done
exit $failed

#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc, and a Python with torch >= 2.11: build, test, sanitize, measure.
#   benchmarks/gpu.sh OUTPUT_FOLDER [PART...]        (PYTHON names the interpreter)
# Parts: build gpu-tests tests triton memcheck racecheck operators step; by default all. Every part has a time limit, and
# together they end within 9 minutes; what earlier parts leave goes to the operators. A part that fails does not stop the
# next ones. Called again with the same folder, the operators' sweep goes on where it ended.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER [PART...]}
shift
all="build gpu-tests tests triton memcheck racecheck operators step"
for name in "$@"; do
    if [[ " $all " != *" $name "* ]]; then
        echo "PART: expected of $all, got $name" >&2
        exit 2
    fi
done
parts=" ${*:-$all} "
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
failed=0
summary=()
# What setup.py finds there without PATH, the tests and the sanitizer shall find too.
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 start=$SECONDS status verdict
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="stopped after $limit s" ;;
        *) verdict="failed, status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    tail -n 3 "$out/$name.log"
    summary+=("$(printf '%-12s %4d s  %s' "$name" "$((SECONDS - start))" "$verdict")")
}

skip() {
    [[ $parts == *" $1 "* ]] || return 0
    summary+=("$(printf '%-12s    –    %s' "$1" "left out: $2")")
}

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>"$out/device.log"; then
    echo "there is no CUDA device, or no torch that sees one:" >&2
    tail -n 1 "$out/device.log" >&2
    exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv >"$out/device.log" 2>&1
# One architecture is enough to run here, whatever list a container sets.
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 4 --dist worksteal); fi

part build 110 env SGR_BUILD=cuda "$python" setup.py build_ext --inplace
if "$python" -c 'import pytest, hypothesis, pytest_benchmark' 2>/dev/null; then
    # The GPU cases first: they are what this machine is for.
    part gpu-tests 100 "$python" -m pytest -q -m gpu --ignore-glob='*test_triton*' "${workers[@]}"
    part tests 60 "$python" -m pytest -q -m "not gpu and not slow" --ignore-glob='*test_triton*' "${workers[@]}"
    if compgen -G 'tests/backends/test_triton*' >/dev/null; then
        part triton 80 "$python" -m pytest -q tests/backends/test_triton* "${workers[@]}"
    else
        skip triton "no such tests"
    fi
else
    for name in gpu-tests tests triton; do skip "$name" "pytest, hypothesis or pytest-benchmark is not installed"; done
fi
for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
        # PyTorch's cache hands out pieces of large allocations: a stray access between them is none to the sanitizer.
        part "$tool" 35 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.ragged
    else
        skip "$tool" "compute-sanitizer is not installed"
    fi
done
left=$((530 - SECONDS))
[[ $parts == *" step "* ]] && left=$((left - 50))
part operators "$left" "$python" -m sgr_kernels.cli bench operators --device cuda --limit $((left - 20)) \
    --out "$out/operators.json"
part step 50 "$python" -m sgr_kernels.cli bench step --device cuda --rounds 5 --out "$out/step.json"

printf '\n%s\n' "summary ($SECONDS s), logs in $out:"
printf '  %s\n' "${summary[@]}"
exit "$failed"

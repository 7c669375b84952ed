#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc, and a Python with torch >= 2.11: build, prove, measure; the most valuable first.
#   benchmarks/gpu.sh OUTPUT_FOLDER [PART...]        (PYTHON names the interpreter, SGR_COMMIT the commit of a copy,
#                                                     SGR_SECONDS how long all may take)
# Parts: device build facts counters device-tests contract triton racecheck memcheck operators step mnist cifar10; by
# default all before step. Every part has a time limit, and together they end within 9 minutes; what is left goes to the
# operators, and what would begin too late is left out. A part that fails does not stop the next ones. One log and a few
# files come out of it, each written as facts come; called again with the same folder, facts, operators, step, mnist and
# cifar10 go on where they ended.
# mnist and cifar10: the paper at its own scale, with SGR_SEEDS networks of a method, from SGR_DATA/mnist and
# SGR_DATA/cifar10. Networks stay in SGR_SCRATCH; what was measured comes out as mnist.tar.gz. From there, or from
# benchmarks/results/paper/full/mnist.tar.gz, a run on another machine goes on, and trains only what is not measured yet.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER [PART...]}
shift
all="device build facts counters device-tests contract triton racecheck memcheck operators step mnist cifar10"
for name in "$@"; do
    if [[ " $all " != *" $name "* ]]; then
        echo "PART: expected of $all, got $name" >&2
        exit 2
    fi
done
parts=" ${*:-${all%% step*}} "
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
cd "$(dirname "$0")/.."
failed=0
total=${SGR_SECONDS:-530}
summary=()
# What setup.py finds there without PATH, the tests, the sanitizer and the profiler shall find too.
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONUNBUFFERED=1

# part NAME SECONDS COMMAND...: interrupted at its limit, so that what it has is written, and killed ten seconds later.
part() {
    local name=$1 limit=$2 start=$SECONDS left=$((total - SECONDS)) status verdict
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        skip "$name" "no time"
        return 0
    fi
    echo "== $name (at most $limit s)" | tee -a "$log"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/part.txt" 2>&1
    status=$?
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="stopped after $limit s" ;;
        *) verdict="failed, status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    cat "$out/part.txt" >>"$log"
    tail -n 3 "$out/part.txt"
    rm -f "$out/part.txt"
    summary+=("$(printf '%-12s %4d s  %s' "$name" "$((SECONDS - start))" "$verdict")")
    echo "== ${summary[-1]}" >>"$log"
}

skip() {
    [[ $parts == *" $1 "* ]] || return 0
    summary+=("$(printf '%-12s    –    %s' "$1" "left out: $2")")
    echo "== ${summary[-1]}" >>"$log"
}

# One start of Python answers all that is to be known before.
if ! known=$("$python" -c '
import importlib.util, torch
assert torch.cuda.is_available()
print("%d.%d" % torch.cuda.get_device_capability(), *(n for n in ("pytest", "hypothesis", "xdist") if importlib.util.find_spec(n)))
' 2>>"$log"); then
    echo "there is no CUDA device, or no torch that sees one:" >&2
    tail -n 1 "$log" >&2
    exit 2
fi
# One architecture is enough to run here, whatever list a container sets.
export TORCH_CUDA_ARCH_LIST=${known%% *}
workers=()
[[ $known == *xdist* ]] && workers=(-n 8 --dist worksteal)
# Other people's warnings, of plugins and of the driver, are not ours to fail on.
pytest=("$python" -m pytest -q -W default -p no:cacheprovider)

part device 30 bash -c 'nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    for tool in nvcc ncu compute-sanitizer git; do command -v $tool || echo "no $tool"; done
    "$0" -m pip list 2>/dev/null | grep -i -E "^(torch|triton|numpy|pytest|setuptools|ninja) "' "$python"
# A binary that was carried along, or what is built here.
if "$python" -c 'import sgr_kernels as s; assert "cuda" in s.backends.build_info()["kernels"]' >>"$log" 2>&1; then
    skip build "the kernels are there"
else
    [[ $parts == *" build "* ]] || echo "note: there are no compiled kernels for GPUs; the part build makes them" | tee -a "$log"
    part build 150 env SGR_BUILD=cuda "$python" setup.py build_ext --inplace
fi

sgr=("$python" -m sgr_kernels.cli)
# A CUDA error that stays ends its process; another goes on with the next fact.
part facts 150 bash -c 'for _ in 1 2 3; do "$@"; status=$?; [ $status -eq 3 ] || exit $status; done' facts \
    "${sgr[@]}" bench facts --device cuda --seconds 140 --out "$out/facts.jsonl"

if command -v ncu >/dev/null; then
    sections=(SpeedOfLight WarpStateStats InstructionStats MemoryWorkloadAnalysis Occupancy LaunchStats)
    for pair in "fused_product 1024,3,32,32" "fused_product 256,3,64,64" "fourier_columns 64,3,224,224"; do
        part counters 35 ncu --clock-control none --launch-skip 4 --launch-count 1 "${sections[@]/#/--section=}" \
            -k "regex:${pair% *}" "${sgr[@]}" bench operators --device cuda --shapes "${pair#* }" --operations v+q \
            --providers "sgr native" --budget 0.01
    done
else
    skip counters "ncu is not installed"
fi

if [[ $known == *pytest*hypothesis* ]]; then
    part device-tests 75 "${pytest[@]}" -v -m gpu tests/backends/test_cuda_device.py tests/penalty/test_graph_capture.py \
        tests/training/test_cuda_graphs.py tests/training/test_step_graphs.py
    part contract 60 "${pytest[@]}" -m gpu --backend native "${workers[@]}" tests/operators
    part triton 60 "${pytest[@]}" -m gpu --backend triton "${workers[@]}" tests/operators
else
    for name in device-tests contract triton; do skip "$name" "pytest or hypothesis is not installed"; done
fi
for tool in racecheck memcheck; do
    if command -v compute-sanitizer >/dev/null; then
        # PyTorch's cache hands out pieces of large allocations: a stray access between them is none to the sanitizer.
        part "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-regex kns=sgr \
            --error-exitcode 9 "$python" -m benchmarks.ragged --backends native --dtypes float32 float16
    else
        skip "$tool" "compute-sanitizer is not installed"
    fi
done
left=$((total - SECONDS))
[[ $parts == *" step "* ]] && left=$((left / 2))
[ "$left" -gt 40 ] || left=40
part operators "$left" "${sgr[@]}" bench operators --device cuda --limit $((left - 20)) --budget 0.5 --out "$out/operators.json" \
    --providers copy "sgr auto" "sgr native" "sgr native tf32" "sgr triton" "sgr triton tf32" "sgr torch" dense "dense tf32" rfft2
part step "$left" "${sgr[@]}" bench step --device cuda --rounds 5 --networks carlini-wagner-mnist resnet18 --out "$out/step.json"

# Correlated noise last: its results need one network each, and so are soonest made where another run goes on.
reproduce() {
    local name=$1 folder=${SGR_SCRATCH:-gpu-reproduction}/$1 data=${SGR_DATA:-}/$1 kept packing=15
    local experiments=(table1 transfer covariance smoothness leaking lrc)
    [[ $parts == *" $name "* ]] || return 0
    if [ ! -d "$data" ]; then
        skip "$name" "no folder $data"
        return 0
    fi
    mkdir -p "$folder"
    for kept in "$out/$name.tar.gz" "benchmarks/results/paper/full/$name.tar.gz"; do
        [ -f "$kept" ] || continue
        if ! gzip -t "$kept" 2>>"$log" || ! tar -xzf "$kept" -C "$folder" --skip-old-files 2>>"$log"; then
            failed=1
            skip "$name" "cannot read $kept"
            return 0
        fi
    done
    part "$name" $((total - SECONDS - packing)) "${sgr[@]}" reproduce "${experiments[@]}" --dataset "$name" --scale full \
        --data "$data" --seeds "${SGR_SEEDS:-1}" --jobs "${SGR_JOBS:-6}" --device cuda --out "$folder"
    tar -czf "$out/$name.tar.gz.new" -C "$folder" --exclude=./networks . && mv "$out/$name.tar.gz.new" "$out/$name.tar.gz"
}
reproduce mnist
reproduce cifar10

printf '\n%s\n' "summary ($SECONDS s), log in $log:" | tee -a "$log"
printf '  %s\n' "${summary[@]}" | tee -a "$log"
exit "$failed"

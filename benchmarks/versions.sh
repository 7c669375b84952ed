#!/usr/bin/env bash
# Which versions of torch and Triton pass the quick tests, and the Triton kernels' own; by hand, an hour and 20 GB.
#
#   benchmarks/versions.sh FOLDER [ROW...]      rows: those below; none: all
#
# Each row has an environment of its own, FOLDER/ROW, made where there is none; a copy of the checkout, with CPU
# kernels built by it, is tested there without a GPU. FOLDER/versions.md gets the outcomes: the table in docs/versions.md.
# PYTHON names the interpreter, 3.10 or later. torch is the index's plain one: on Linux a build with CUDA.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift

quick="tests/loss/test_loss.py tests/operators/test_autograd.py tests/operators/test_transforms.py"
quick="$quick tests/project/test_without_driver.py"
interpreted=tests/backends/triton_interpreter
tools="numpy scipy hypothesis pytest pytest-benchmark pytest-xdist matplotlib safetensors tqdm setuptools wheel ninja"
# name | torch | Triton in place of torch's own | tests | environment
rows="
torch-2.11|torch==2.11.*||$quick|SGR_BUILD=cpu
torch-2.13|torch==2.13.*||$quick|SGR_BUILD=cpu
torch-2.14|torch==2.14.*||$quick|SGR_BUILD=cpu
torch-newest|torch||$quick|SGR_BUILD=cpu
triton-3.6|torch==2.13.*|triton==3.6.*|$interpreted|TRITON_INTERPRET=1 SGR_BUILD=none
triton-3.7|torch==2.13.*|triton==3.7.*|$interpreted|TRITON_INTERPRET=1 SGR_BUILD=none
triton-3.9|torch==2.13.*|triton==3.9.*|$interpreted|TRITON_INTERPRET=1 SGR_BUILD=none
"

make_environment() { # folder, torch, triton
    "${PYTHON:-python3}" -m venv "$1"
    # shellcheck disable=SC2086  (a list of words)
    "$1/bin/python" -m pip install -q "$2" $tools
    if [ -n "$3" ]; then "$1/bin/python" -m pip install -q --no-deps "$3"; fi
}

outcome() { # row, tests, environment: the last line of pytest
    local here=$folder/$1
    rm -rf "$here/source" && mkdir "$here/source"
    git -C "$root" ls-files -z | tar -C "$root" --null -T - -cf - | tar -C "$here/source" -xf -
    cd "$here/source"
    # shellcheck disable=SC2086
    if ! env $3 "$here/bin/python" setup.py -q build_ext --inplace >"$here/build.log" 2>&1; then
        echo "build failed"
        return
    fi
    # shellcheck disable=SC2086
    env $3 PYTHONPATH=. OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= \
        "$here/bin/python" -m pytest -q -p no:cacheprovider $2 >"$here/tests.log" 2>&1 || true
    tail -n 1 "$here/tests.log" | sed 's/ in [0-9].*//'
}

table=$folder/versions.md
[ -f "$table" ] || printf '| | torch | Triton | Python | outcome |\n|---|---|---|---|---|\n' >"$table"
while IFS='|' read -r name torch triton tests environment; do
    if [ -z "$name" ] || { [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; }; then continue; fi
    [ -x "$folder/$name/bin/python" ] || make_environment "$folder/$name" "$torch" "$triton"
    versions=$("$folder/$name/bin/python" -c '
import platform, torch
try:
    import triton
except ImportError:
    triton = None
print(torch.__version__, "|", triton.__version__ if triton else "none", "|", platform.python_version())')
    line="| $name | $versions | $(outcome "$name" "$tests" "$environment") |"
    sed -i "/^| $name |/d" "$table"
    echo "$line" | tee -a "$table"
done <<<"$rows"

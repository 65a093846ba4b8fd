#!/usr/bin/env bash
# All that is to be found out on a machine with a GPU, in the order of its worth:
#
#     bench/gpu_day.sh FOLDER                 what has not been done yet, as far as the time goes
#     bench/gpu_day.sh FOLDER build plan-grid some of it
#     bench/gpu_day.sh --list                 the names, with the seconds that each may take
#     bench/gpu_day.sh --rehearse FOLDER      without a GPU: the kernels as the tests compile them for the CPU
#
# A stage is a process of its own under `timeout`, so that a kernel that hangs costs one stage. Its output goes to
# FOLDER/NAME.log, its numbers to FOLDER/NAME.json, and its exit status and seconds to FOLDER/summary.txt. A stage
# that stands there is not run again: copy that one file into the folder of the next call to go on, also on a machine
# that came new. Only the build is always run, which does what is left to do. FOLDER/all.tar.gz holds all files.
#
# The build needs nvcc, a Python with torch, pybind11, scikit-build-core, cmake and ninja, and no network; pybind11 and
# pytest may also lie as wheels in a folder .whl of this tree. MINUTES=9 bounds a call, CUDA_PYTHON names the Python.
set -uo pipefail
cd "$(dirname "$0")/.."

# Name, seconds, and a command. The most telling comes first: does each kind of plan work, then how fast it is.
stages() {
    cat <<'STAGES'
versions            60 show_versions
build              420 build
plan-step           60 every_way plain-step
plan-cluster        60 every_way plain-cluster
plan-cluster-16     60 tests tests/cuda/test_scan.py -k "long_products and cluster-of-16 and LSTM and $CHOSEN"
plan-barrier        60 every_way plain-cluster-barrier
plan-block          60 every_way plain-block
plan-grid           60 every_way plain-grid
plan-stay           60 tests tests/cuda/test_scan.py -k "long_products and stay and LSTM and $CHOSEN"
bf16               200 tests tests/cuda/test_scan.py -k "every_way and bf16 and $CHOSEN"
time-768           150 compare H=768 B=16 dtype=bf16,fp16 cell=LSTM,GRU T=1024 layers=1 directions=1 ragged=False
exchange-mbarrier  150 FASTRNN_CUDA_PLAN=cluster compare H=128,512 B=16 dtype=bf16 cell=LSTM T=1024 layers=1 directions=1 ragged=False
exchange-barrier   150 FASTRNN_CUDA_PLAN=cluster-barrier compare H=128,512 B=16 dtype=bf16 cell=LSTM T=1024 layers=1 directions=1 ragged=False
together           120 tests tests/cuda/test_layers.py -k "(graph_capture or streams or synchronisation) and $CHOSEN"
every-way          240 tests tests/cuda/test_scan.py -k "every_way and not bf16 and $CHOSEN"
scan               240 tests tests/cuda/test_scan.py -k "not every_way and $CHOSEN"
layers             240 tests tests/cuda/test_layers.py tests/cuda/test_sync.py -k "$CHOSEN"
bench-bf16         270 compare dtype=bf16 T=128 layers=1 directions=1 ragged=False B=16,64
bench-shapes       270 compare dtype=bf16 H=128,512,1024 layers=1,2 T=128 B=16,64 cell=LSTM,GRU mode=training
profile-768        120 profile H=768 B=16 T=128
profile-128        120 profile H=128 B=64 T=128
profile-2048       120 profile H=2048 B=16 T=128
memcheck           240 sanitize memcheck
racecheck          240 sanitize racecheck
device-a           400 tests --device $DEVICE tests/test_[a-e]*.py
device-f           400 tests --device $DEVICE tests/test_[f-o]*.py
device-p           400 tests --device $DEVICE tests/test_[p-z]*.py
bench-fp16         270 compare dtype=fp16 T=128 layers=1 directions=1 ragged=False B=16,64
bench-tf32         270 compare dtype=tf32 T=128 layers=1 directions=1 ragged=False B=16,64
bench-fp32         270 compare dtype=fp32 T=128 layers=1 directions=1 ragged=False B=16,64
bench-long         270 compare dtype=bf16 T=1024 layers=1 directions=1 ragged=False
cpu-scaling        240 scale
STAGES
}

show_versions() {
    nvidia-smi || echo "no nvidia-smi"
    nvcc --version || echo "no nvcc"
    lscpu | head -25
    "$PYTHON" - <<'PY'
import importlib.metadata as metadata
import sys
print(sys.version)
for name in "torch triton pybind11 scikit-build-core cmake ninja pytest pytest-xdist hypothesis flashrnn".split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not here")
PY
    echo "commit ${COMMIT:-unknown: say COMMIT=... where the tree comes without its history}"
}

# For this GPU's architecture alone; in a rehearsal, the harness.
build() {
    if [ "$REHEARSE" = 1 ]; then
        (cd tests/cuda && "$PYTHON" -c "from harness import build; build.load()")
        return
    fi
    if compgen -G ".whl/*.whl" >/dev/null; then
        "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target build/site .whl/*.whl || return
    fi
    PYTHONPATH=build/site make build/cuda CUDA_PYTHON="$PYTHON" || return
    "$PYTHON" -c "
import fastrnn, torch
from fastrnn._load import _cuda
print(fastrnn.__file__, 'built for', _cuda.built_for, torch.cuda.get_device_name(), torch.cuda.get_device_capability())"
}

pytests() { "$PYTHON" -m pytest -p no:cacheprovider -q "$@"; }

# One plan of a cell, forward and backward, against the reference implementation.
every_way() {
    pytests "tests/cuda/test_scan.py::test_every_way[$TARGET-LSTM-bf16-$1]" \
        "tests/cuda/test_scan.py::test_every_way[$TARGET-GRU-f32-$1]"
}

tests() {
    if [ "$REHEARSE" = 1 ]; then
        pytests --collect-only "$@" | tail -3 && return  # the harness takes its time for these
    fi
    if "$PYTHON" -c "import xdist" 2>/dev/null; then set -- -n 6 "$@"; fi
    pytests "$@"
}

compare() {
    local only=() each
    for each in "$@"; do only+=(--only "$each"); done
    if [ "$REHEARSE" = 1 ]; then only+=(--rehearse --minutes 0.02); fi
    "$PYTHON" -m bench.cuda --minutes 4 "${only[@]}" --json "$OUT/$NAME.json"
}

profile() {
    local only=(--only dtype=bf16 --only cell=LSTM --only mode=training --only layers=1 --only directions=1) each
    for each in "$@" ragged=False; do only+=(--only "$each"); done
    if [ "$REHEARSE" = 1 ]; then
        "$PYTHON" -m bench.cuda --profile --rehearse "${only[@]}"
        return
    fi
    # The clocks stay as they are.
    ncu --clock-control none --set full --kernel-name "regex:(forward|backward)_kernel" --launch-skip 2 --launch-count 2 \
        --force-overwrite --export "$OUT/$NAME" "$PYTHON" -m bench.cuda --profile "${only[@]}" || return
    ncu --import "$OUT/$NAME.ncu-rep" --page details
}

sanitize() {
    local run=("$PYTHON" -m pytest -p no:cacheprovider -q tests/cuda/test_scan.py
        -k "every_way and bf16 and ragged-resets and LSTM and $CHOSEN")
    if [ "$REHEARSE" = 1 ]; then
        "${run[@]}" --collect-only | tail -1
        return
    fi
    compute-sanitizer --tool "$1" --error-exitcode 1 "${run[@]}"
}

scale() {
    local few=()
    if [ "$REHEARSE" = 1 ]; then few=(--shapes 1 --threads 2); fi
    "$PYTHON" -m bench.scaling "${few[@]}" --json "$OUT/$NAME.json"
}

REHEARSE=0
TARGET=cuda
CHOSEN="not harness" # -k cuda would match the folder's name
DEVICE=cuda
PYTHON=${CUDA_PYTHON:-python3}
case "${1-}" in
--list)
    stages | cut -c 1-23
    exit
    ;;
--rehearse)
    REHEARSE=1 TARGET=harness CHOSEN=harness DEVICE=harness
    PYTHON=${CUDA_PYTHON:-$PWD/.venv/bin/python}
    shift
    ;;
esac
if [ $# -lt 1 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
if [ "$REHEARSE" = 0 ]; then
    export PYTHONPATH="$PWD/build/cuda:$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export COMMIT=${COMMIT-$(git describe --always --dirty --abbrev=12 2>/dev/null)} # names what is measured
export PYTHONUNBUFFERED=1 REHEARSE TARGET CHOSEN DEVICE PYTHON OUT

for wanted in "$@"; do
    stages | grep -q "^$wanted " || { echo "no stage $wanted; --list shows them" >&2 && exit 2; }
done
touch "$OUT/summary.txt"
end=$((SECONDS + 60 * ${MINUTES:-9}))
export -f build compare every_way profile pytests sanitize scale show_versions tests

failed=0
while read -r NAME seconds command; do
    if [ $# -gt 0 ] && [[ " $* build " != *" $NAME "* ]]; then continue; fi
    if [ "$NAME" != build ] && grep -q "^$NAME " "$OUT/summary.txt"; then continue; fi
    left=$((end - SECONDS))
    if [ "$left" -lt $((seconds < 60 ? seconds : 60)) ]; then
        echo "no time left for $NAME and what follows" && break
    fi
    export NAME
    begin=$SECONDS
    timeout --kill-after=5 "$((seconds < left ? seconds : left))" bash -c "$command" >"$OUT/$NAME.log" 2>&1 </dev/null
    code=$?
    took=$((SECONDS - begin))
    echo "== $NAME: exit $code, ${took} s"
    tail -n 3 "$OUT/$NAME.log"
    [ $code = 0 ] || failed=1
    # What the call's own end cut short is run again by the next.
    if { [ $code = 124 ] || [ $code = 137 ]; } && [ "$took" -lt "$seconds" ]; then continue; fi
    if [ "$NAME" = build ] && [ $code != 0 ]; then break; fi
    echo "$NAME $code $took" >>"$OUT/summary.txt"
done < <(stages)
(cd "$OUT" && rm -f all.tar.gz && tar -czf "${TMPDIR:-/tmp}/all.$$" -- * && mv "${TMPDIR:-/tmp}/all.$$" all.tar.gz)
exit $failed

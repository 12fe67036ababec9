#!/usr/bin/env bash
# Everything that needs one CUDA device, in one call under 10 minutes, the most telling first (docs/gpu.md).
#   bash benchmarks/gpu.sh             first call: kernels right? how fast? where does a step's time go? peers
#   bash benchmarks/gpu.sh second      what takes longer: layouts, a run, compiled networks, all peers, the largest model
#   bash benchmarks/gpu.sh PART...     these parts alone (names below), each with its share of the whole time
#   bash benchmarks/gpu.sh --rehearse [...]   no device: each part on the CPU, as small as can be
# One deadline (LIMIT, 560 s) for all; a part that hangs or crashes is stopped and named, and the next one runs. Results:
# $OUT (benchmarks/results/gpu) with log.txt, which ends with what became of every part and every failure by name.
# $PYTHON (python3) with the packages it has; what is missing is said and skipped, and nothing is fetched.
#
# Bring swin_moe/_C.so along, or a quarter of the time goes into building it. It needs no device to build, only nvcc, and
# fits every Python but one minor version of torch, that of the device's machine (2.11 here):
#   python3 -m venv /tmp/build && /tmp/build/bin/pip install "torch==2.11.*" "setuptools<82" ninja numpy
#   PATH=/tmp/build/bin:$PATH SWIN_MOE_CUDA_ARCHITECTURES=90 python setup.py build_ext --inplace
# A library of another torch or of other sources than those in csrc/ is noticed, and built anew.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3} OUT=${OUT:-benchmarks/results/gpu}
# shellcheck source=benchmarks/parts.sh
. benchmarks/parts.sh

FIRST="smoke kernels roofline profile timm timm_base moe ncu sanitizer networks"
SECOND="layouts train memory compiled peers simmim giant"
rehearse="" device=cuda chosen=() named=""
for argument in "$@"; do
    case $argument in
        --rehearse) rehearse=yes device=cpu ;;
        first) read -ra more <<<"$FIRST" && chosen+=("${more[@]}") ;;
        second) read -ra more <<<"$SECOND" && chosen+=("${more[@]}") ;;
        *)
            [[ " $FIRST $SECOND " == *" $argument "* ]] || { echo "error: no part $argument; there are: $FIRST $SECOND"; exit 2; }
            chosen+=("$argument") named=yes
            ;;
    esac
done
LIMIT=${LIMIT:-$([ -n "$rehearse" ] && echo 1800 || echo 560)} # a rehearsal may be on a small machine that others use
[ ${#chosen[@]} -gt 0 ] || read -ra chosen <<<"$FIRST"
wanted=(machine build "${chosen[@]}")

scratch=$(mktemp -d)
# Where this Python's own programs are, ninja among them; choices are measured anew.
PATH="$("$PYTHON" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 XDG_CACHE_HOME="$scratch/cache"
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# seconds NAME: what a part may take; where parts were named, their share of what is there.
declare -A SECONDS_OF=(
    [smoke]=45 [kernels]=75 [roofline]=50 [profile]=60 [timm]=25 [timm_base]=45 [moe]=25 [ncu]=45 [sanitizer]=45 [networks]=60
    [layouts]=130 [train]=30 [memory]=40 [compiled]=110 [peers]=110 [simmim]=60 [giant]=90
)
slow=$([ -n "$rehearse" ] && echo 4 || echo 1) stretch=100
if [ -n "$named" ] && [ -z "$rehearse" ]; then
    sum=0
    for name in "${chosen[@]}"; do sum=$((sum + SECONDS_OF[$name])); done
    stretch=$(((LIMIT - 40) * 100 / sum))
    [ "$stretch" -ge 100 ] || stretch=100
fi
seconds() { echo $((SECONDS_OF[$1] * slow * stretch / 100)); }

begin "$LIMIT"
git rev-parse HEAD 2>/dev/null
command -v nvidia-smi >/dev/null &&
    timeout 10 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory --format=csv,noheader
allowed=3 part machine $((90 * slow)) "$PYTHON" benchmarks/gpu_machine.py --device $device
found=$?
if [ $found -eq 3 ]; then
    command -v ninja >/dev/null || echo "== no ninja on PATH: one file is compiled after another, which takes minutes"
    part build $((240 * slow)) "$PYTHON" benchmarks/gpu_machine.py --device $device --build
    found=$?
elif [ $found -ne 0 ]; then
    rm -rf "$scratch"
    finish
    exit 1
fi
kernels=yes
[ $found -eq 0 ] || { kernels="" && echo "== without compiled kernels: what is about them alone is skipped"; }

# pytest: names as they come and at the end; hanging tests end by themselves where that is installed.
tests=("$PYTHON" -m pytest -v -rfE --tb=short --no-header -p no:cacheprovider -m gpu)
if has pytest_timeout; then tests+=(--timeout 50 --timeout-method thread); else tests+=(-o faulthandler_timeout=40); fi
processes() { ! has xdist || echo "-n$([ -n "$rehearse" ] && echo 2 || echo "$1")"; }
train=("$PYTHON" -m swin_moe.train)
data=(data.name=synthetic engine.device=$device log.tensorboard=false "run.output=$scratch/runs")

# What each part is given: on a device, and in a rehearsal as little as shows that it works.
if [ -z "$rehearse" ]; then
    smoke=() large=(--size large --calls 0) small=(--size small --calls 0)
    roofline=(--seconds 35 --peers sdpa) peers=(--seconds $(($(seconds peers) - 20)))
    profile=() timm=(--batch 128 --rounds 5) base=(--batch 64 --rounds 5 --only swinv2_base_window16)
    compiled=(--batch 64 --rounds 3 --compile both)
    moe=(--device cuda) digits=(engine.precision=bf16 optim.epochs=3 optim.warmup_epochs=1)
    memory=(swin_tiny_patch4_window7_224 data.synthetic_samples=512 data.global_batch=64 optim.epochs=1
        optim.warmup_epochs=0 engine.precision=bf16 log.every=1 parallel.hardware=h200)
    simmim=(simmim_pretrain__swinv2_base__img192_window12__800ep data.synthetic_samples=1280 data.global_batch=64
        optim.epochs=2 optim.warmup_epochs=0.5 optim.schedule=cosine "optim.milestones=[]" engine.precision=bf16 log.every=5)
else
    smoke=(--device cpu --size small --calls 1 --only "window 7, bf16; moe_; grouped_linear; draws") large=() small=()
    roofline=(--given h200) peers=(--given h200)
    profile=(--device cpu --batch 1 --steps 1 --top 3 --only swin_tiny)
    timm=(--device cpu --batch 1 --rounds 1) base=(--device cpu --batch 1 --rounds 1 --only swin_tiny)
    compiled=(--device cpu --batch 1 --rounds 1)
    moe=(--tokens 288 --dim 32 --rounds 2) digits=(data.synthetic_samples=256 optim.epochs=1 optim.warmup_epochs=0)
    memory=(configs/debug/digits_swin_moe.yaml data.synthetic_samples=128 optim.epochs=1 optim.warmup_epochs=0 log.every=1
        parallel.hardware=cpu)
    simmim=(configs/debug/digits_simmim.yaml data.synthetic_samples=128 optim.epochs=1 optim.warmup_epochs=0)
fi

# runs NEEDS NAME COMMAND...: a part, if what it needs is here: kernels, a tool on PATH (>ncu), a module, or nothing (-).
runs() {
    local needs=$1 name=$2
    shift
    case $needs in
        -) ;;
        kernels) [ -n "$kernels" ] || { skip "$name" "no compiled kernels"; return; } ;;
        \>*)
            [ -z "$rehearse" ] || { skip "$name" "a rehearsal has no device"; return; }
            [ -n "$kernels" ] || { skip "$name" "no compiled kernels"; return; }
            command -v "${needs#>}" >/dev/null || { skip "$name" "no ${needs#>} on PATH"; return; }
            ;;
        *) has "$needs" || { skip "$name" "$needs is not installed"; return; } ;;
    esac
    part "$name" "$(seconds "$name")" "${@:2}"
}

runs kernels smoke "$PYTHON" benchmarks/gpu_smoke.py "${smoke[@]}"
# shellcheck disable=SC2046
runs pytest kernels "${tests[@]}" $(processes 8) --junitxml="$OUT/kernels.xml" tests/ops tests/moe tests/data tests/checkpoint
runs kernels roofline "$PYTHON" benchmarks/kernels/roofline.py "${roofline[@]}"
runs - profile "$PYTHON" benchmarks/gpu_profile.py "${profile[@]}"
runs timm timm "$PYTHON" benchmarks/train_step.py --precision bf16 --only swin_tiny "${timm[@]}"
runs timm timm_base "$PYTHON" benchmarks/train_step.py --precision bf16 "${base[@]}"
runs - moe "$PYTHON" benchmarks/kernels/moe_rate.py "${moe[@]}"
runs '>ncu' ncu ncu --clock-control none --section SpeedOfLight --section WarpStateStats --section Occupancy \
    --section MemoryWorkloadAnalysis -k regex:window_ -c 6 --csv --log-file "$OUT/ncu.csv" \
    "$PYTHON" benchmarks/gpu_smoke.py "${large[@]}" --only "window 16, bf16, dot; window 7, bf16, dot"
runs '>compute-sanitizer' sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$PYTHON" benchmarks/gpu_smoke.py "${small[@]}" --only "window 12, bf16, cos; large, 32, bf16, cos; moe_unpermute, bf16"
# shellcheck disable=SC2046
runs pytest networks "${tests[@]}" $(processes 4) --junitxml="$OUT/networks.xml" -k "not layouts" tests/test_gpu.py
# Second call. Only where it was asked for: `wanted` holds it.
runs pytest layouts "${tests[@]}" --junitxml="$OUT/layouts.xml" -k layouts tests/test_gpu.py
runs - train "${train[@]}" configs/debug/digits_swin_moe.yaml "${data[@]}" "${digits[@]}" run.name=train
# Ends with what the planner said beside what was measured, max_memory_allocated among it (docs/planner.md).
runs - memory "${train[@]}" "${memory[@]}" "${data[@]}" run.name=memory
runs timm compiled "$PYTHON" benchmarks/train_step.py --precision bf16 --only swin_tiny "${compiled[@]}"
runs kernels peers "$PYTHON" benchmarks/kernels/roofline.py "${peers[@]}"
runs - simmim "${train[@]}" "${simmim[@]}" "${data[@]}" run.name=simmim
runs '>nvidia-smi' giant "$PYTHON" benchmarks/training/large_step.py swinv2_giant_3b_patch4_window12_192_simmim \
    engine.device=cuda parallel.zero=0 data.global_batch=1 data.micro_batch=1
rm -rf "$scratch"
finish

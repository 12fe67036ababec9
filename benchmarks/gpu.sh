#!/usr/bin/env bash
# Everything that needs one CUDA device, in one call under 10 minutes: the compiled kernels, GPU tests, kernels against the
# floor of the device and their peers, short training runs, networks against timm, MoE layers.
#   bash benchmarks/gpu.sh              results under $OUT, or benchmarks/results/gpu if OUT is not set
#   bash benchmarks/gpu.sh PART...      only these parts, with ten times the time of each
# The limits of the parts add up to less than the 10 minutes.
# Uses $PYTHON (default python3) with the packages it has; what is missing is said and skipped, and nothing is fetched.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0 wanted=("$@")

part() { # part NAME SECONDS COMMAND...: runs one part, keeps its output, goes on after a failure
    local name=$1 seconds=$2
    shift 2
    if [ ${#wanted[@]} -gt 0 ]; then
        [[ " ${wanted[*]} " == *" $name "* ]] || return 0
        seconds=$((seconds * 10))
    fi
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name ended with exit code $code"; failed=1; }
}

has() { "$PYTHON" -c "import $1" 2>/dev/null || { echo "== $1 is not installed: $2 is skipped"; return 1; }; }

"$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "error: this torch sees no CUDA device"; exit 1; }
part machine 15 "$PYTHON" -c '
import platform, torch
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")'
nvidia-smi --query-gpu=driver_version --format=csv,noheader | tee -a "$OUT/machine.txt"
git rev-parse HEAD 2>/dev/null | tee -a "$OUT/machine.txt"

# Only for this device: the others' code would take as long again.
SWIN_MOE_CUDA_ARCHITECTURES=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
    SWIN_MOE_REQUIRE_EXT=1 part build 130 "$PYTHON" setup.py build_ext --inplace
has pytest "the GPU tests" && part tests 100 "$PYTHON" -m pytest -q -m gpu tests
part roofline 75 "$PYTHON" benchmarks/roofline.py --seconds $((${#wanted[@]} ? 600 : 55))
data=digits
has sklearn "training on the digits (synthetic images instead)" || data=synthetic
part train 25 "$PYTHON" -m swin_moe.train configs/debug/digits_swin_moe.yaml data.name=$data engine.device=cuda \
    engine.precision=bf16 optim.epochs=3 optim.warmup_epochs=1 log.tensorboard=false run.output="$(mktemp -d)"
if has timm "the comparison with timm"; then
    for precision in fp32 bf16; do
        part "train_step_$precision" 25 "$PYTHON" benchmarks/train_step.py --device cuda --batch 64 \
            --precision $precision --only swin_tiny,swinv2_tiny,swin_moe_small
    done
    part swinv2_base 40 "$PYTHON" benchmarks/train_step.py --device cuda --batch 64 --precision bf16 \
        --only swinv2_base_window16
fi
part moe_rate 20 "$PYTHON" benchmarks/moe_rate.py --device cuda
part moe_rate_compiled 40 "$PYTHON" benchmarks/moe_rate.py --device cuda --compile
part simmim 35 "$PYTHON" -m swin_moe.train simmim_pretrain__swinv2_base__img192_window12__800ep data.name=synthetic \
    data.synthetic_samples=1280 data.global_batch=64 optim.epochs=2 optim.warmup_epochs=0.5 optim.schedule=cosine \
    "optim.milestones=[]" engine.precision=bf16 engine.device=cuda log.every=5 log.tensorboard=false run.output="$(mktemp -d)"
part swinv2_giant_step 60 "$PYTHON" benchmarks/large_step.py swinv2_giant_3b_patch4_window12_192_simmim engine.device=cuda \
    parallel.zero=0 data.global_batch=1 data.micro_batch=1
exit $failed

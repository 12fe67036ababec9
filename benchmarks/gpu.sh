#!/usr/bin/env bash
# Everything that needs one CUDA device, in one call under 10 minutes: GPU tests, a short training run, the step benchmark.
#   bash benchmarks/gpu.sh            results under $OUT, or benchmarks/results/gpu if OUT is not set
# The limits of the parts add up to less than the 10 minutes.
# Uses $PYTHON (default python3) with the packages it has; what is missing is said and skipped, and nothing is fetched.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

part() { # part NAME SECONDS COMMAND...: runs one part, keeps its output, goes on after a failure
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name ended with exit code $code"; failed=1; }
}

has() { "$PYTHON" -c "import $1" 2>/dev/null || { echo "== $1 is not installed: $2 is skipped"; return 1; }; }

"$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "error: this torch sees no CUDA device"; exit 1; }
part machine 20 "$PYTHON" -c '
import platform, torch
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")'
nvidia-smi --query-gpu=driver_version --format=csv,noheader | tee -a "$OUT/machine.txt"
git rev-parse HEAD 2>/dev/null | tee -a "$OUT/machine.txt"

has pytest "the GPU tests" && part tests 170 "$PYTHON" -m pytest -q -m gpu tests
data=digits
has sklearn "training on the digits (synthetic images instead)" || data=synthetic
part train 60 "$PYTHON" -m swin_moe.train configs/debug/digits_swin_moe.yaml data.name=$data engine.device=cuda \
    engine.precision=bf16 optim.epochs=3 optim.warmup_epochs=1 log.tensorboard=false run.output="$(mktemp -d)"
if has timm "the comparison with timm"; then
    for precision in fp32 bf16; do
        part "train_step_$precision" 50 "$PYTHON" benchmarks/train_step.py --device cuda --batch 64 --precision $precision
    done
fi
part moe_rate 30 "$PYTHON" benchmarks/moe_rate.py --device cuda
part moe_rate_compiled 70 "$PYTHON" benchmarks/moe_rate.py --device cuda --compile
part swinv2_giant_step 110 "$PYTHON" benchmarks/large_step.py swinv2_giant_3b_patch4_window12_192_22k engine.device=cuda \
    parallel.zero=0 data.global_batch=1
exit $failed

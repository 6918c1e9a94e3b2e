#!/usr/bin/env bash
# Everything that is to be known about this GPU, in one go: the tests that need one, attention, steps, budgets.
#
#   benchmarks/gpu.sh [python] > benchmarks/results/$(date -I)_gpu.md
#   SKIP=networks,sampling benchmarks/gpu.sh ...      without the parts that train; each of them fits ten minutes
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

measure() { # a command that prints Markdown; one that fails does not end the others
    printf '\n## `python %s`\n\n' "$*"
    "$python" "$@" || echo "**failed with exit status $?**"
}

verbatim() { # a command that prints for a terminal
    printf '\n## `python %s`\n\n```\n' "$*"
    "$python" "$@" || echo "failed with exit status $?"
    echo '```'
}

echo "# A GPU"
verbatim -m pytest -q -m gpu
measure benchmarks/attention.py --scale b --batch 128 --precision bf16
measure benchmarks/attention.py --scale xl --batch 64 --grid 64 --precision bf16
for choice in "" --compile "--compile --checkpointing"; do
    # shellcheck disable=SC2086  # none, one or two words
    measure benchmarks/step.py --scale b --batch 128 --precision bf16 $choice
    # shellcheck disable=SC2086
    measure benchmarks/step.py --scale xl --batch 64 --precision bf16 $choice
done
verbatim benchmarks/budget.py --model dcdit_b --batch 128 --precision bf16 --device cuda
verbatim benchmarks/budget.py --model dcdit_b --batch 128 --precision bf16 --device cuda --compile

skipped() { [[ ",${SKIP:-}," == *",$1,"* ]]; }

# What a laptop is too small for: DC-DiT N4 beside DiT/2 with twelve blocks, at equal training compute and upcycled
if ! skipped networks; then
    measure scripts/compare_networks.py digits trainer=gpu
    measure scripts/compare_networks.py mnist trainer=gpu
fi
# FID against FLOPs and time, by drops, caching, both and fewer steps
if ! skipped sampling; then
    verbatim benchmarks/sampling.py runs/networks_digits/DCDiT_{0,1,2} --device cuda --out runs/sampling_gpu
fi

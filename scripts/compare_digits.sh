#!/usr/bin/env bash
# DC-DiT beside plain DiTs on handwritten digits, at equal training compute: trains 18 small networks, measures them at
# several budgets and writes runs/comparison/report/report.html. Three quarters of an hour on two cores; broken off, it goes on.
#
#     bash scripts/compare_digits.sh [python]        (docs/digits.md has the results)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
networks="dcdit dit_2 dit_4 no_multi_budget cosine unsmoothed"
# Networks as small as these use one core well and two badly: as many are trained side by side as there are cores.
export OMP_NUM_THREADS=1

for network in $networks; do
    for seed in 0 1 2; do
        echo "experiment=compare_$network seed=$seed run_name=comparison/${network}_seed_$seed ckpt_path=auto"
    done
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -L 1 "$python" -m dcdit.train

checkpoints() { # of these networks, separated by commas
    for network in "$@"; do
        printf '%s,' runs/comparison/"$network"_seed_*/checkpoints/last.ckpt
    done | sed 's/,$//'
}
measure="$python -m dcdit.evaluate -m reference=data/digits8/train features=digits count=500 labels=balanced
    sampler=ddim sampler.steps=25 sampler.clip=true"
# One after the other, for the times to be comparable
$measure drop_fractions=[0] checkpoint="$(checkpoints dit_2 dit_4)"
$measure drop_fractions=[0,0.2,0.4,0.6] checkpoint="$(checkpoints dcdit no_multi_budget cosine unsmoothed)"
"$python" -m dcdit.report runs/comparison out=runs/comparison/report title="DC-DiT and DiT on digits"

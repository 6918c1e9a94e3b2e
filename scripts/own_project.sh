#!/usr/bin/env bash
# Runs examples/own_project as its reader would: with the wheel of dcdit in a new environment, far from this checkout.
#
#   bash scripts/own_project.sh [python]     .venv/bin/python by default
#
# The environment gets the wheels of dcdit and of the example, and nothing else of them. Their dependencies are those that
# the given Python has installed, added behind by a .pth file: this saves their download and changes nothing of what is
# tested. An editable dcdit of that Python does not count, for Python reads no .pth file of a folder that a .pth file names.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${1:-$root/.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH DCDIT_PLUGINS DCDIT_DATA DCDIT_RUNS
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -m pip wheel --quiet --no-deps -w "$work/wheels" "$root" "$root/examples/own_project"
"$python" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --no-deps "$work"/wheels/*.whl
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
cp -r "$root/examples/own_project/tests" "$work/project"
cd "$work/project"
PATH=$work/env/bin:$PATH

expect() { # that a file is there, or that it holds a text
    if ! { [ -e "$1" ] && grep -q "${2:-}" "$1"; }; then
        echo "$0: $1 is not there, or has no ${2:-content}" >&2
        exit 1
    fi
}

python -c 'import dcdit, own_project, sys
for package in dcdit, own_project: assert package.__file__.startswith(sys.prefix), package.__file__'
python -m pytest -q -p no:cacheprovider .

tiny="experiment=gradient_digits model.width=32 model.depth=1 model.encoder_width=16 model.grid=8 data.batch_size=16
    callbacks.progress=null multi_budget.full_budget_steps=1"
few="sampler=heun sampler.steps=2"
dcdit train $tiny trainer.max_steps=2
dcdit train $tiny trainer.max_steps=4 ckpt_path=last
dcdit train resume=runs/gradient_digits trainer.max_steps=5
dcdit train -m $tiny trainer.max_steps=1 compression=2,4
dcdit sample checkpoint=runs/gradient_digits $few per_class=1
expect runs/gradient_digits/samples/boundaries.png
dcdit evaluate checkpoint=runs/gradient_digits $few reference=data/digits8/val features=digits metrics='[mean]' count=40
dcdit report runs/gradient_digits
expect report/measurements.json mean_distance

# Without the package, the checkpoint says what it needs, and imports nothing.
python -m pip uninstall --quiet --yes own-project
if dcdit sample checkpoint=runs/gradient_digits $few > said 2>&1; then
    echo "$0: a checkpoint was opened without its plug-in" >&2
    exit 1
fi
expect said 'own_project'
expect said 'own-project 0.1.0'
echo "examples/own_project trains, goes on, sweeps, samples, evaluates and reports with the wheel alone"

#!/usr/bin/env bash
# Tries the wheel of dcdit in a new environment that has its core dependencies alone, far from this checkout: version, help
# of every command, an image, two steps of training, and what is said where an optional package is missing.
#
#   bash scripts/wheel.sh [python [wheel]]            .venv/bin/python by default; without a wheel, one is built
#   INSTALL=1 bash scripts/wheel.sh [python [wheel]]  installs the dependencies by pip: minutes, and gigabytes
#
# Without INSTALL the dependencies are links to those that the given Python has installed (scripts/link_core.py).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${1:-$root/.venv/bin/python}")
wheel=${2:+$(realpath "$2")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH DCDIT_PLUGINS DCDIT_DATA DCDIT_RUNS
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    echo "$0: $*" >&2
    exit 1
}

if [ -z "$wheel" ]; then
    "$python" -m pip wheel --quiet --no-deps -w "$work" "$root"
    wheel=$(echo "$work"/dcdit-*.whl)
fi
"$python" -m venv "$work/env"
env=$work/env/bin/python
if [ -n "${INSTALL:-}" ]; then
    "$env" -m pip install --quiet -c "$root/constraints.txt" "$wheel"
else
    "$env" -m pip install --quiet --no-deps "$wheel"
    "$python" "$root/scripts/link_core.py" dcdit "$("$env" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
fi
"$env" -m pip check
mkdir "$work/elsewhere"
cd "$work/elsewhere"
PATH=$work/env/bin:$PATH

said=$(dcdit --version)
[ "$said" = "dcdit $(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/dcdit/__init__.py")" ] || fail "$said is another version"
dcdit completion bash | bash -n || fail "dcdit completion bash"
commands=$(dcdit | sed -n 's/^  \([a-z_]*\) .*/\1/p')
[ "$(wc -w <<< "$commands")" -gt 10 ] || fail "dcdit lists no commands"
for command in $commands; do
    dcdit "$command" --help > help || fail "dcdit $command --help"
done
dcdit sample checkpoint=digits per_class=1 sampler=ddim sampler.steps=2 out=samples
[ -s samples/samples.png ] || fail "there is no picture of samples"
tiny="experiment=b_n4 debug=tiny model.depth=1 model.width=64 model.heads=2 model.encoder_width=64"
dcdit train $tiny run_dir=run
dcdit status run > said
grep -q finished said || fail "the run is not finished"

refuses() { # an optional package's extra, and the words of a command that needs it
    local remedy="pip install 'dcdit[$1]'"
    shift
    if dcdit "$@" > said 2>&1; then
        fail "dcdit $* works without an optional package that it needs"
    fi
    if grep -q Traceback said || ! tr -d '│\n' < said | tr -s ' ' | grep -qF "$remedy"; then
        cat said >&2
        fail "dcdit $* does not say: $remedy"
    fi
}

mkdir -p autoencoder images/kind
cp samples/samples.png images/kind
echo '{"_class_name": "AutoencoderRAE"}' > autoencoder/config.json
refuses demo train experiment=digits
refuses explore explore
refuses flash-attn train $tiny model.attention=flash_attn
refuses optuna train $tiny hparams_search=optuna
refuses parquet extract reader=parquet source=images out=out
refuses rae extract source=images out=out autoencoder=autoencoder
refuses s3 inspect_latents directory=s3://bucket/latents
refuses slurm train experiment=b_n4 cluster=slurm cluster.dry_run=true
refuses tensorboard train $tiny logger=tensorboard
refuses wandb train $tiny logger=wandb
echo "the wheel samples, trains, and names the extra of each optional package ($("$env" --version))"

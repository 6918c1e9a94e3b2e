#!/usr/bin/env bash
# Measure dcdit on a GPU in ten minutes, on a machine that may have no network: benchmarks/gpu.sh --help
# PYTHON says which Python; .venv/bin/python if that is there, else python3.
cd "$(dirname "$0")/.." || exit
[ -x .venv/bin/python ] && usual=.venv/bin/python || usual=python3
exec "${PYTHON:-$usual}" benchmarks/gpu/run.py "$@"

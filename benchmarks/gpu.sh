#!/usr/bin/env bash
# What a GPU is asked in its first eight minutes: see benchmarks/gpu/__main__.py. No Ray, no network, nothing installed.
#
#     benchmarks/gpu.sh                    under 8 minutes
#     benchmarks/gpu.sh --quick            under 3
#     PYTHON=python3.12 benchmarks/gpu.sh --output FOLDER --only attention logits
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="lib:.${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"

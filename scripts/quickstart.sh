#!/usr/bin/env bash
# Train a dense, a top-k MoE and a ReMoE language model on real text and compare them, on a CPU, in minutes.
# Sets up .venv, builds a small corpus, trains and evaluates, and writes a table and a picture to runs/quickstart.
# A second call reuses finished runs. --train-iters N shortens the training. After setup, --help lists the options.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

is_ready || answer_help "$@"
prepare_environment
exec "$VENV/bin/python" "$ROOT/tools" quickstart "$@"

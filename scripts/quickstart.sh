#!/usr/bin/env bash
# From nothing to a comparison of a dense, a top-k MoE and a ReMoE language model on real text, on a CPU, in minutes:
# sets up .venv, builds a small corpus, trains and evaluates the three, and writes a table and a picture to runs/quickstart.
# A second call reuses what is done. QUICKSTART_ITERS=N shortens the training. Once .venv is there, --help lists
# the options.
set -euo pipefail
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

answer_help quickstart "$@"
prepare_environment
cd "$ROOT"
exec "$VENV/bin/python" tools/quickstart "$@"

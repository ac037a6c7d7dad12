#!/usr/bin/env bash
# Trains a list of models over size, experts, granularity, routings and their settings, one after another or as Slurm jobs;
# skips what is finished, and collects a table and a picture of the validation loss. --help lists the options.
#   DATA_DIR=data bash scripts/sweep.sh --figures experts --experts 4 8 16
# The environment of the launch scripts holds here too: lib/launch.sh lists it.
set -euo pipefail
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

find_interpreter
"$PYTHON" -c 'import rich, matplotlib' 2>/dev/null || die "PYTHON=$PYTHON lacks this project's packages:" \
  "run scripts/setup.sh, or set PYTHON to an interpreter that has them"
exec "$PYTHON" "$LAUNCH_ROOT/tools/sweep" "$@"

#!/usr/bin/env bash
# Train many models and compare them in a table and a picture. --help lists the options.
#   DATA_DIR=data bash scripts/sweep.sh --figures experts --experts 4 8 16
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"
run_tool sweep "$@"

#!/usr/bin/env bash
# Train the paper's 469M model. --help lists arguments and environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"
run_tool train 469m remoe "$@"

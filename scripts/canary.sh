#!/usr/bin/env bash
# What another version of Megatron would break: runs what can be run of this project against a Megatron-LM checkout or a
# wheel of megatron-core, and prints a table; exit code 1 where something fails. Once .venv is there,
# --help lists the options.
set -euo pipefail
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

answer_help canary "$@"
prepare_environment
exec "$VENV/bin/python" "$ROOT/tools/canary" "$@"

#!/usr/bin/env bash
# Runs the tests with the sources of a different Megatron. Arguments: a clone, its commit, and those of pytest:
#   scripts/try_megatron.sh ~/Megatron-LM d98e8a64dd tests/layer
# The compiled helper is the installed release's. FOLDER=... keeps the sources for tests.megatron_changes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"

[[ $# -ge 2 ]] || set -- --help
answer_help "$@"
choose_python
if [[ -z ${FOLDER-} ]]; then
  FOLDER=$(mktemp -d) && trap 'rm -rf "$FOLDER"' EXIT
fi
mkdir -p "$FOLDER" && FOLDER=$(realpath "$FOLDER")
git -C "$1" archive "$2" megatron ":!megatron/core/datasets/Makefile" | tar -x -C "$FOLDER"
cp "$("$PYTHON" -c 'import megatron.core.datasets as m; print(m.__path__[0])')"/helpers_cpp*.so "$FOLDER/megatron/core/datasets/"
cd "$ROOT"
REMOE_TRY_MEGATRON=1 PYTHONPATH=$FOLDER "$PYTHON" -m pytest "${@:3}"

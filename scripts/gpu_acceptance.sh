#!/usr/bin/env bash
# Run all GPU tests (pytest -m gpu) on one GPU, without network, the most valuable first.
# Figures go to OUT; a second call runs only tests without figures. Arguments go to pytest.
#   PYTHON=/path/to/python      the interpreter (default: .venv's, else python3)
#   CARRIED=folder              wheels (docs/gpu.md); they are installed next to the interpreter's packages
#   OUT=folder                  default: runs/gpu
#   REHEARSE=1                  run without a GPU, to see that the tests start and end
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"
answer_help "$@"
choose_python
cd "$ROOT"
if [[ -n ${CARRIED-} ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$folder" "$CARRIED"/*.whl
  export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
fi
run=(pytest)
if [[ -n ${REHEARSE-} ]]; then run=(tests.gpu.rehearsed pytest); fi
"$PYTHON" -m "${run[@]}" -m gpu -rs --gpu-report "${OUT:-runs/gpu}" "$@" tests/gpu tests/layer

#!/usr/bin/env bash
# Run everything that only a GPU can show, the most valuable first, on one GPU and without network: pytest -m gpu.
# Figures go to OUT; a second call continues with the tests that have none. Arguments go to pytest.
#   PYTHON=/path/to/python      the interpreter (default: .venv's, else python3)
#   CARRIED=folder              wheels (docs/gpu.md); they are installed next to the interpreter's packages
#   OUT=folder                  default: runs/gpu
#   REHEARSE=1                  without a GPU: do the tests start and end?
set -euo pipefail
# shellcheck source=scripts/lib/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"
answer_help "$@"
choose_python
cd "$ROOT"
if [[ -n ${CARRIED-} ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  site=$folder/site-packages # QuACK goes by this name
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$CARRIED"/*.whl
  # A .pth file adds the second, but is only read in the interpreter's own folder.
  export PYTHONPATH="$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
fi
run=(pytest)
if [[ -n ${REHEARSE-} ]]; then run=(tests.gpu.rehearsed pytest); fi
"$PYTHON" -m "${run[@]}" -m gpu -rs --gpu-report "${OUT:-runs/gpu}" "$@" tests/gpu tests/layer tests/routing

#!/usr/bin/env bash
# Run everything that only a GPU can show, the most valuable first, on one GPU and without network: pytest -m gpu.
# Figures go to runs/gpu; a second call continues with the tests that have none. Arguments go to pytest.
#   PYTHON=/path/to/python      the interpreter (default: .venv's, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON-} && -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
exec "${PYTHON:-python3}" -m pytest -m gpu -rs --gpu-report runs/gpu "$@" tests/gpu tests/moe tests/routing

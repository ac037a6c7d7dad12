#!/usr/bin/env bash
# What only a GPU can show, on one of them and without network, the most valuable first: pytest -m gpu, with the figures of
# each test in runs/gpu. A second call goes on with the tests whose figures are not there. Arguments go to pytest.
#   PYTHON=/path/to/python      the interpreter (default: .venv's, else python3)
set -euo pipefail
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

find_interpreter
cd "$LAUNCH_ROOT"
exec "$PYTHON" -m pytest -m gpu -rs --gpu-report runs/gpu "$@" tests/gpu tests/moe tests/routing

#!/usr/bin/env bash
# Run all checks: ruff, mypy, shellcheck and the tests, TEST_PROCESSES (default 2) files at a time.
#   --fast   only the tests that take seconds (tests/conftest.py lists them) and the static checks; must come first
# Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

answer_help "$@"
prepare_environment
cd "$ROOT"
if [[ ${1-} == --fast ]]; then
  set -- -m "not slow and not bulk and not gpu and not servers and not slurm" "${@:2}"
fi

order=(--dist loadfile --no-loadscope-reorder) # tests/conftest.py has long files first
exec "$VENV/bin/python" -m pytest --numprocesses "${TEST_PROCESSES:-2}" "${order[@]}" "$@"

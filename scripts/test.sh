#!/usr/bin/env bash
# Run all checks: ruff, mypy, shellcheck, pytest. Each runs even if an earlier one failed.
#   --fast   only the tests that take seconds (tests/conftest.py lists them); must come first
# Other arguments go to pytest, which runs TEST_PROCESSES (default 2) files at a time.
set -euo pipefail
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

if asks_for_help "$@"; then print_header && exit; fi
prepare_environment
cd "$ROOT"
failed=""

check() {
  local name=$1 output
  shift
  if output=$("$@" 2>&1); then
    printf '%-11s ok\n' "$name"
  else
    printf '%-11s failed\n%s\n' "$name" "$output"
    failed+=" $name"
  fi
}

check ruff "$VENV/bin/python" -m ruff check --output-format concise .
check mypy "$VENV/bin/python" -m mypy
check shellcheck find . \( -path ./.venv -o -path ./.git -o -path ./runs \) -prune \
  -o \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -type f -exec "$VENV/bin/shellcheck" --external-sources {} +

if [[ ${1-} == --fast ]]; then set -- -m "not slow and not bulk and not gpu" "${@:2}"; fi

# One test needs lm-eval and its 400 MB of dependencies. Without a network it is skipped.
if ! "$VENV/bin/python" -c 'import lm_eval, datasets' 2>/dev/null; then
  pip_install --quiet 'lm-eval[hf]' || true
fi

status=0
order=(--dist loadfile --no-loadscope-reorder) # tests/conftest.py has long files first
"$VENV/bin/python" -m pytest --numprocesses "${TEST_PROCESSES:-2}" "${order[@]}" "$@" || status=$?
if [[ -n $failed ]]; then
  echo "Failed before pytest:$failed" >&2
  exit 1
fi
exit "$status"

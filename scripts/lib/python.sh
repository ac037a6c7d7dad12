# shellcheck shell=bash
# Sourced by the scripts: run_tool COMMAND ARGUMENTS... runs `remoe COMMAND` with PYTHON, .venv's Python, or python3.
run_tool() {
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
  if [[ -z ${PYTHON-} && -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
  export PYTHON=${PYTHON:-python3}
  exec "$PYTHON" "$root/tools" "$@"
}

# shellcheck shell=bash
# Sourced by the scripts: choose the interpreter, run a command of remoe, answer --help.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

choose_python() { # exports PYTHON: as given, else .venv's, else python3
  if [[ -z ${PYTHON-} && -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; fi
  export PYTHON=${PYTHON:-python3}
}

run_tool() { # COMMAND ARGUMENTS...
  choose_python
  exec "$PYTHON" "$ROOT/tools" "$@"
}

answer_help() { # ARGUMENTS...: prints the comment at the top of the script, and exits, if they ask for help
  if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; fi
}

# shellcheck shell=bash
# Sourced by the scripts: make .venv from pyproject.toml and requirements.txt. Uses PYTHON and TORCH_INDEX_URL.
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
VENV=$ROOT/.venv STAMP=$ROOT/.venv/remoe-setup SETUP_LOG=$ROOT/runs/setup.log

fail() { printf 'error: %s\n' "$1" >&2 && exit 1; }

find_python() { # prints the path of the Python to make .venv with
  local name IFS=$'\n'
  for name in ${PYTHON:-$(type -aP python3.13 python3.12 python3)}; do # pyenv's shim of a missing version does not run
    "$name" -c 'import ensurepip, sys; assert sys.version_info >= (3, 12); print(sys._base_executable)' 2>/dev/null &&
      return
  done
  fail "${PYTHON:-python3.13, python3.12 or python3}: no Python >= 3.12 with ensurepip has this name. Install one, \
for example with 'apt install python3.13-venv' or 'uv python install 3.13', or set PYTHON to the path of one."
}

pip_install() { # Python compiles the modules that it imports; to compile all of them here takes a minute
  "$VENV/bin/python" -m pip install --no-input --no-compile --progress-bar off -c "$ROOT/requirements.txt" "$@"
}

run_step() { # LABEL COMMAND...: the output goes to the log
  local start=$SECONDS
  printf '  %-16s' "$1"
  "${@:2}" >>"$SETUP_LOG" 2>&1 </dev/null || {
    tail -n 15 "$SETUP_LOG" >&2
    fail "setup failed at $1. Its log is $SETUP_LOG. If PyPI cannot be reached, set PIP_INDEX_URL. Then run this again."
  }
  printf '%4d s\n' $((SECONDS - start))
}

describe_environment() { # prints Python's version and place, and hashes of two files: .venv depends on them
  "${PYTHON:-$VENV/bin/python}" -V 2>&1
  echo "$VENV" "$(cat "$ROOT/pyproject.toml" "$ROOT/requirements.txt" | cksum)"
}

is_ready() { [[ -x $VENV/bin/python && $(cat "$STAMP" 2>&1) == "$(describe_environment)" ]]; }

make_environment() {
  [[ ! -e $VENV || (-f $STAMP && ! -L $VENV) ]] || fail "$VENV was not made by this script. Move it away."
  python=$(find_python)
  echo "Making .venv with $python: 6 GB, half of it to fetch. TORCH_INDEX_URL can name a smaller torch."
  mkdir -p "$VENV" "$(dirname "$SETUP_LOG")"
  # An environment of the same Python at the same place is brought up to date.
  [[ $(cat "$STAMP" 2>&1) == "$("$python" -V)"$'\n'"$VENV "* ]] || find "$VENV" -mindepth 1 ! -path "$STAMP" -delete
  echo unfinished | tee "$STAMP" >"$SETUP_LOG"
  run_step "environment" "$python" -m venv "$VENV"
  run_step "pip" pip_install --upgrade pip setuptools
  run_step "torch" pip_install ${TORCH_INDEX_URL:+--no-deps --index-url "$TORCH_INDEX_URL"} torch # deps: from PyPI
  run_step "megatron-core" pip_install "megatron-core[training]"
  compgen -G "$VENV/lib/python3*/site-packages/megatron/core/datasets/helpers_cpp*" >/dev/null || {
    "$VENV/bin/python" -m pip cache remove megatron_core >>"$SETUP_LOG" 2>&1 || true # there may be no cache
    fail "megatron-core has no wheel for this system, and was built without its C++ part. Install a C++ compiler and \
Python's headers, or use Python 3.12 or 3.13 on Linux. Then run this again."
  }
  run_step "this project" pip_install --no-build-isolation --editable "${ROOT}[dev]"
  describe_environment >"$STAMP"
}

prepare_environment() { # makes .venv if it is missing, unfinished or out of date; waits for a setup that is running
  unset PYTHONHOME PYTHONPATH PIP_CONSTRAINT PYTHONDONTWRITEBYTECODE # keep other environments out of .venv
  export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
  is_ready || (
    if command -v flock >/dev/null; then flock 9; fi
    is_ready || make_environment
  ) 9>"$ROOT/.venv.lock"
}

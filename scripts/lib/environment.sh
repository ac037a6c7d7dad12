# shellcheck shell=bash
# Sourced by the scripts: finds a Python that really runs, and keeps .venv as pyproject.toml and requirements.txt say.
#   PYTHON           the interpreter to use (default: the first suitable one found)
#   TORCH_INDEX_URL  where torch comes from (default: the index that pip uses for everything)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
VENV=$ROOT/.venv
SETUP_LOG=$ROOT/runs/setup.log
STAMP=$VENV/remoe-setup # "unfinished", or what the environment was made from
# shellcheck source=scripts/lib/help.sh
source "$ROOT/scripts/lib/help.sh"

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# ---------------------------------------------------------------- finding a Python

# Prints the paths where a Python may be, one a line; $1 is put before the fixed places.
python_places() {
  local fixed=${1-} name path
  for name in python3.12 python3.13 python3 python python3.14; do
    type -aP "$name" || true # all of them: a pyenv shim that fails can stand before one that runs
  done
  for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python \
    "$HOME"/.local/share/uv/python/cpython-3.*/bin/python3 "$HOME"/{miniforge,miniconda,anaconda}3/bin/python3 \
    "$fixed"/opt/conda/bin/python3 "$fixed"/usr/{local/,}bin/python3.1[2-9] "$fixed"/usr/bin/python3; do
    if [[ -x $path ]]; then echo "$path"; fi
  done
}

# Prints "KIND VERSION PATH" of a Python that runs. KIND: ready; newer (than megatron-core's wheels); unfit (too old, or
# without ensurepip).
ask_python() {
  "$1" -c '
import sys
kind = "unfit"
if sys.version_info >= (3, 12):
    import ctypes, importlib.util, ssl, venv, zlib
    if importlib.util.find_spec("ensurepip"):
        kind = "ready" if sys.version_info < (3, 14) else "newer"
path = getattr(sys, "_base_executable", "") or sys.executable
print("%s %d.%d.%d %s" % ((kind,) + tuple(sys.version_info[:3]) + (path,)))
' 2>/dev/null </dev/null
}

# Prints "KIND VERSION PATH" of the Python to use: $PYTHON, else the first ready one, else the first newer one.
find_python() {
  local place answer version newer="" unfit=""
  if [[ -n ${PYTHON-} ]]; then
    answer=$(ask_python "$PYTHON") && [[ $answer != unfit* ]] ||
      fail "PYTHON=$PYTHON is not a Python >= 3.12 that runs and has ensurepip, venv, ssl, zlib and ctypes: ${answer:-it does not run}." \
        "Set PYTHON to another one, or unset it to have one looked for."
    echo "$answer"
    return
  fi
  while IFS= read -r place; do
    answer=$(ask_python "$place") || continue
    case $answer in
      ready*) echo "$answer" && return ;;
      newer*) newer=${newer:-$answer} ;;
      *) read -r _ version _ <<<"$answer" && unfit+=" $place ($version)" ;;
    esac
  done < <(python_places "${1-}")
  [[ -n $newer ]] || fail "No Python >= 3.12 that runs and has ensurepip was found. Unfit:${unfit:- none}." \
    "Looked for: python3.12, python3.13, python3.14, python3 and python on PATH; pyenv's, uv's and conda's folders;" \
    "/usr/local/bin and /usr/bin. Get one with one of:" \
    "  apt install python3.13 python3.13-venv    (Debian 13; Ubuntu 24.04: python3.12 python3.12-venv)" \
    "  conda create -n py312 python=3.12         (then PYTHON=\$(conda run -n py312 which python))" \
    "  pyenv install 3.12" \
    "  uv python install 3.12" \
    "or set PYTHON to the path of one."
  echo "$newer"
}

# ---------------------------------------------------------------- making the environment

create_venv() {
  "$1" -m venv "$VENV" && pip_install --upgrade pip setuptools
}

pip_install() { # Python compiles what it imports; to compile all of it takes a minute
  "$VENV/bin/python" -m pip install --no-input --no-compile --progress-bar off --constraint "$ROOT/requirements.txt" "$@"
}

install_torch() {
  if [[ -n ${TORCH_INDEX_URL-} ]]; then
    pip_install --no-deps --index-url "$TORCH_INDEX_URL" torch # the pinned versions of the rest may not be there
  else
    pip_install torch
  fi
}

# Compiled here, a module of Megatron does not print a SyntaxWarning into the first training.
install_megatron() {
  pip_install "megatron-core[training]"
  "$VENV/bin/python" -W ignore -m compileall -q "$VENV"/lib/python*/site-packages/megatron
}

# Builds without isolation, thus with the pinned setuptools; megatron-core, installed before, may need another one.
install_project() { pip_install --no-build-isolation --editable "${ROOT}[dev]"; }

# ---------------------------------------------------------------- telling what goes on

# Runs until killed, or until the script that it reports on is gone.
show_progress() {
  local start=$SECONDS seconds
  while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    seconds=$((SECONDS - start))
    if [[ -t 1 ]]; then
      printf '\r  %-20s %4d s' "$1" "$seconds"
    elif ((seconds % 60 == 0)); then
      printf '  %-20s %4d s so far\n' "$1" "$seconds"
    fi
  done
}

# run_step LABEL COMMAND...: output to the log; on the console one line, and the end of the log if it fails.
run_step() {
  local label=$1 start=$SECONDS status=0 progress
  shift
  show_progress "$label" 9>&- & # must not keep the lock
  progress=$!
  ("$@") >>"$SETUP_LOG" 2>&1 </dev/null || status=$? # a subshell, so that a trap of this one still has the console
  kill "$progress" 2>/dev/null || true
  wait "$progress" 2>/dev/null || true
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
  if ((status == 0)); then
    printf '  %-20s %4d s\n' "$label" $((SECONDS - start))
    return
  fi
  printf '  %-20s failed after %d s\n\n' "$label" $((SECONDS - start))
  if grep -qE 'connection broken by|name resolution|Network is unreachable' "$SETUP_LOG"; then
    fail "No network: pip cannot reach its package index. Connect, or set HTTPS_PROXY, or PIP_INDEX_URL to another index;" \
      "then run the same command again. The whole log is in $SETUP_LOG."
  fi
  tail -n 15 "$SETUP_LOG" >&2
  fail "" "Set-up failed; the whole log is in $SETUP_LOG. Once the cause is gone, run the same command again."
}

# ---------------------------------------------------------------- the environment as a whole

# What the environment was made from: where it is and its Python's version, then the files that say what is in it.
current_stamp() {
  "$VENV/bin/python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3], sys.prefix)' 2>/dev/null || echo none
  cat "$ROOT/pyproject.toml" "$ROOT/requirements.txt" | cksum
}

# True if .venv is complete and, where $1 is an answer of find_python, of that Python's version.
environment_is_ready() {
  [[ -f $STAMP && $(<"$STAMP") == "$(current_stamp)" ]] && { [[ -z $1 ]] || is_of_python "$1"; }
}

# True if the complete .venv, where it stands, runs and is of the version that find_python answered.
is_of_python() {
  local version first now
  read -r _ version _ <<<"$1"
  read -r first <"$STAMP"
  read -r now < <(current_stamp)
  [[ $first == "$version $VENV" && $now == "$first" ]]
}

# Allow one setup at a time. Without flock (macOS), concurrent setups are not prevented.
lock_environment() {
  command -v flock >/dev/null || return 0
  exec 9>"$ROOT/.venv.lock"
  flock --nonblock 9 && return
  echo "Another set-up is at work here; waiting for it."
  flock 9
}

make_environment() {
  local found=$1 version python start=$SECONDS
  read -r _ version python <<<"$found"
  if [[ -L $VENV ]]; then fail "$VENV is a link. Remove it, or set up where it points to."; fi
  if [[ -e $VENV/bin && ! -f $STAMP ]]; then
    fail "$VENV exists, but was not made by this script." "Move it away and run the same command again."
  fi
  trap 'echo; echo "Interrupted; the same command starts over." >&2; exit 130' INT
  mkdir -p "$(dirname "$SETUP_LOG")"
  : >"$SETUP_LOG"
  if [[ -f $STAMP ]] && is_of_python "$found"; then
    echo "Bringing .venv up to date (Python $version)."
    echo unfinished >"$STAMP"
    run_step "pip" pip_install --upgrade pip setuptools
  else
    echo "Setting up .venv with Python $version ($python); some minutes, once."
    if [[ $(uname -s) == Linux && -z ${TORCH_INDEX_URL-} ]]; then
      echo "PyPI's torch for Linux is a CUDA build: about 3 GB to fetch, 6 GB on disk."
      echo "To take a smaller one from a CPU-only index, stop here and set TORCH_INDEX_URL."
    fi
    if [[ $found == newer* ]]; then
      echo "megatron-core has no wheel for Python $version: it will be compiled, which takes a C++ compiler."
    fi
    rm -rf "$VENV.old"
    if [[ -e $VENV ]]; then mv "$VENV" "$VENV.old" && rm -rf "$VENV.old"; fi # cut off here, it is still known as ours
    mkdir "$VENV"
    echo unfinished >"$STAMP"
    run_step "environment and pip" create_venv "$python"
  fi
  run_step "torch" install_torch
  run_step "megatron-core" install_megatron
  run_step "the rest" install_project
  current_stamp >"$STAMP"
  trap - INT
  echo "The environment is ready after $((SECONDS - start)) s."
}

# Makes .venv where it is missing, unfinished, or older than the files that describe it; else returns at once.
prepare_environment() {
  local found=""
  unset PYTHONHOME PYTHONPATH PIP_CONSTRAINT # .venv stands alone: what other environments set does not reach it
  unset PYTHONDONTWRITEBYTECODE              # as in many containers; each start would compile all it imports, for 7 s
  export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
  if [[ -n ${PYTHON-} ]]; then found=$(find_python); fi
  if environment_is_ready "$found"; then return; fi
  lock_environment
  if ! environment_is_ready "$found"; then
    if [[ -z $found && -f $STAMP ]]; then found=$(ask_python "$VENV/bin/python") || found=""; fi # keep to its version
    found=${found:-$(find_python)}
    make_environment "$found"
  fi
  exec 9>&-
}

# Answers --help without setting anything up: with a tool's own where .venv is ready, else with the script's header.
answer_help() { # COMMAND ARGUMENTS
  if ! asks_for_help "${@:2}"; then return; fi
  if environment_is_ready ""; then exec "$VENV/bin/python" "$ROOT/tools" "$1" --help; fi
  print_header
  exit
}

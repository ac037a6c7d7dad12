#!/usr/bin/env bash
# Everything that only a GPU can show, on one of them, without network, in a quarter of an hour at most; --help lists parts
# and options. A second call goes on with what is missing. It needs PyTorch, Triton, NumPy and megatron-core alone.
#   REHEARSE=1 bash scripts/gpu_acceptance.sh     plays it over a CUDA that does nothing: what runs, and what cannot
#   PYTHON=/path/to/python                        the interpreter (default: .venv's, else python3)
set -euo pipefail
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

find_interpreter
exec "$PYTHON" "$LAUNCH_ROOT/tools/gpu_acceptance" "$@"

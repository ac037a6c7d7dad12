#!/usr/bin/env bash
# Test on one GPU everything that needs one, without network, in at most 15 minutes. --help lists parts and options.
# A second call continues with what is missing. It needs only PyTorch, Triton, NumPy and megatron-core.
#   REHEARSE=1 bash scripts/gpu_acceptance.sh     simulate it on a CUDA that does nothing
#   PYTHON=/path/to/python                        the interpreter (default: .venv's, else python3)
set -euo pipefail
# shellcheck source=scripts/lib/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"
run_tool gpu_acceptance "$@"

#!/usr/bin/env bash
# Makes .venv in this folder, with all that training, the tools and the tests need. Takes under a second if up to date.
# PYTHON=/path/to/python picks the interpreter (default: python3.13, python3.12 or python3, the first >= 3.12);
# TORCH_INDEX_URL=... picks the index that torch comes from.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

answer_help "$@"
prepare_environment
echo "Ready: $VENV/bin/python"

#!/usr/bin/env bash
# Makes .venv in this folder, with all that training, the tools and the tests need. Takes under a second if up to date.
# PYTHON=/path/to/python picks the interpreter; TORCH_INDEX_URL=... picks the index that torch comes from.
set -euo pipefail
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

if asks_for_help "$@"; then print_header && exit; fi
prepare_environment
echo "Ready: $VENV/bin/python"

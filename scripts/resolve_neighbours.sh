#!/usr/bin/env bash
# Prints which extras resolve beside which neighbours, with the versions chosen (Python 3.12, glibc 2.39). Installs
# nothing. Needs uv: pip install uv. Arguments replace the neighbours: resolve_neighbours.sh vllm==0.33.0
set -euo pipefail
# shellcheck source=scripts/lib/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"

answer_help "$@"
platform=(--python-version 3.12 --python-platform x86_64-manylinux_2_39)
shown='^(torch|transformers|fla-core|transformer-engine)=='

cell() { # NEIGHBOUR EXTRA: the versions, or "no"
  local found
  found=$(printf '%s\n' "megatron-remoe[$2] @ file://$ROOT" "${1#alone}" |
    uv pip compile --quiet --no-header --no-annotate "${platform[@]}" - 2>/dev/null) || { echo no && return; }
  grep -E "$shown" <<<"$found" | sed 's/==/ /' | paste -sd, | sed 's/,/, /g'
}

[[ $# -gt 0 ]] || set -- alone vllm==0.33.0 sglang==0.5.23 nemo-automodel==0.7.0 megatron-bridge==0.6.2
for neighbour; do
  for extra in tools hf kernels gpu; do echo "| $neighbour | $extra | $(cell "$neighbour" "$extra") |"; done
done

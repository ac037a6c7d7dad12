#!/usr/bin/env bash
# Prints the table of docs/upstream.md: which extras resolve next to which packages, and their versions, on Python 3.12
# with glibc 2.39. Installs nothing. Needs uv (pip install uv). Arguments replace the packages: vllm==0.33.0 ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/python.sh"

answer_help "$@"
declare -A shown=([tools]=torch [hf]=transformers [kernels]=fla-core [gpu]='torch|transformer-engine')

versions() { # PACKAGE EXTRA: the versions that uv would install, or "no"
  local all
  all=$(printf '%s\n' "megatron-remoe[$2] @ file://$ROOT" "${1#nothing}" |
    uv pip compile --quiet --no-header --no-annotate --python-version 3.12 --python-platform x86_64-manylinux_2_39 - \
      2>/dev/null) || { echo no && return; }
  grep -E "^(${shown[$2]})==" <<<"$all" | sed 's/==/ /' | paste -sd, | sed 's/,/, /g'
}

[[ $# -gt 0 ]] || set -- nothing vllm==0.33.0 sglang==0.5.23 nemo-automodel==0.7.0 megatron-bridge==0.6.2
printf '%s\n' "| next to | tools | hf | kernels | gpu |" "|---|---|---|---|---|"
for package; do
  row="| ${package/==/ } |"
  for extra in tools hf kernels gpu; do row+=" $(versions "$package" "$extra") |"; done
  echo "$row"
done

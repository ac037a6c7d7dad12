#!/usr/bin/env bash
# The paper's 469M model.
# [gpus_per_node] [train_iters] [micro_batch_size] [ffn_expansion] [project_name] [-- Megatron flags]
# lib/launch.sh lists the environment variables.
set -euo pipefail
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

launch 469m dense "$@"

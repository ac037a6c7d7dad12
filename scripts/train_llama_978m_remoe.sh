#!/usr/bin/env bash
# The paper's 978M model.
# [gpus_per_node] [train_iters] [micro_batch_size] [num_experts] [granularity] [project_name] [-- Megatron flags]
# lib/launch.sh lists the environment variables.
set -euo pipefail
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

launch 978m remoe "$@"

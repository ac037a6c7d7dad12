# shellcheck shell=bash
# Sourced by launch.sh: what suits the GPUs of a training, its layers, kernels and environment.

has_gpu() {
  command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# Prints a line for Transformer Engine and one for apex's module for weight gradients: usable, or what is wrong.
ask_for_kernels() {
  "$PYTHON" -c '
from importlib import import_module, util

def answer(*modules):
    if util.find_spec(modules[-1].partition(".")[0]) is None:
        return ": not installed"
    try:
        for module in modules:
            import_module(module)
    except Exception as error:
        return " cannot be imported: %s: %s" % (type(error).__name__, (str(error).splitlines() or [""])[0])
    return "usable"

answers = answer("transformer_engine.pytorch"), answer("torch", "fused_weight_gradient_mlp_cuda")
print(*answers, sep="\n")
' 2>/dev/null | tail -n 2
}

# What suits the machine into HARDWARE: fast where there is a GPU, plain PyTorch without Transformer Engine; ENGINE tells which
# and why. A dry run plans for GPUs on any machine.
set_hardware_flags() {
  local engine="" apex=""
  HARDWARE=() ENGINE=""
  if [[ " $* " == *" --cpu "* ]] || { ! is_planned && ! has_gpu; }; then
    return # the entry trains on the CPU and needs no flags for it
  fi
  HARDWARE+=(--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
  { IFS= read -r engine && IFS= read -r apex; } < <(ask_for_kernels) || true
  if [[ " $* " == *" --transformer-impl"[\ =]"local "* ]]; then engine=": not asked for"; fi
  if [[ $engine == usable ]]; then
    ENGINE="Transformer Engine"
    HARDWARE+=(--transformer-impl transformer_engine)
    if [[ $ROUTING != dense ]]; then HARDWARE+=(--moe-grouped-gemm); fi
  else
    ENGINE="plain PyTorch (Transformer Engine${engine:-: $PYTHON did not say})"
    HARDWARE+=(--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion)
    if [[ -z ${KERNELS-} ]]; then HARDWARE+=(--no-rope-fusion); fi
  fi
  # Without apex PyTorch's product, which no card has run in its place, adds the weight gradients of Megatron's own linear layers,
  # of which the output layer is always one. The flag is one for all, Transformer Engine's layers included.
  if [[ $apex != usable && -z ${KERNELS-} ]]; then HARDWARE+=(--no-gradient-accumulation-fusion); fi
}

# What KERNELS stands for into FAST.
set_kernel_flags() {
  FAST=()
  case ${KERNELS-} in
    "") ;;
    triton)
      "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("fla") is None)' ||
        die "KERNELS=triton needs flash-linear-attention's kernels: $PYTHON -m pip install fla-core"
      # shellcheck disable=SC2034 # launch.sh reads it
      FAST=(--moe-kernels triton --cross-entropy-loss-fusion --ddp-average-in-collective)
      ;;
    *) die "KERNELS=$KERNELS: choose triton, or leave it unset" ;;
  esac
}

# Prints the value of a flag that counts, the last one: last_value FLAG WORDS...
last_value() {
  local flag=$1 value=""
  shift
  while (($#)); do
    case $1 in
      "$flag") value=${2-} ;;
      "$flag="*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# Whether the GPUs, in a dry run those that are planned for, are of a generation before Blackwell.
before_blackwell() {
  local capability
  if is_planned; then
    [[ ${GPU-} != [bB][0-9]* && ${GPU-} != [gG][bB][0-9]* ]]
  else
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || true
    capability=${capability%%.*}
    [[ ! $capability =~ ^[0-9]+$ ]] || ((capability < 10))
  fi
}

# Prints words so that a shell, or Python's shlex, reads them back; printf %q depends on the locale.
quoted() {
  local word
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    printf '%s ' "$word"
  done
}

# The environment of a training on GPUs into SETTINGS: set_settings MEGATRON FLAGS... What the user has set stays.
set_settings() {
  local words=" $* " graphs
  SETTINGS=()
  if [[ -z $ENGINE ]]; then return; fi
  # Megatron refuses TP or CP without it before Blackwell, and FSDP with it; overlapped expert parallelism wants more.
  if [[ $(last_value --tensor-model-parallel-size "$@")-$(last_value --context-parallel-size "$@") != 1-1 ]] &&
    before_blackwell &&
    [[ ! $words =~ \ --(use-torch-fsdp2|use-megatron-fsdp|overlap-moe-expert-parallel-comm)\  ]]; then
    SETTINGS+=("CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS-1}")
  fi
  # The number of pairs changes from step to step, and segments of fixed size would fragment. All torch versions read this
  # name, and so do Megatron's checks. CUDA graphs, NCCL's buffers and checkpoint workers do not bear it without more settings.
  graphs=$(last_value --cuda-graph-impl "$@")
  if [[ -z ${PYTORCH_ALLOC_CONF+set} && ${graphs:-none} == none && ! $words =~ \ --use-(nccl-ub|persistent-ckpt-worker)\  ]]; then
    SETTINGS+=("PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}")
  fi
}

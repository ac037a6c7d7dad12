# shellcheck shell=bash
# Sourced by scripts/train_llama_*.sh: turns a size, a routing and the positional arguments into one torchrun command.
#
# Environment, all optional but the data:
#   DATA_PATH      prefixes of the data (of .bin/.idx), with weights if you like; with blanks in them: one a line; or
#   DATA_DIR       a folder of them, taken with equal weights: the Pile's shards 01 to 29, or else every *_document.bin
#   VOCAB_FILE, MERGE_FILE   GPT-2's encoder.json and vocab.bpe, or gpt2-vocab.json and gpt2-merges.txt
#                                                           (default: in DATA_DIR, or in the folder above it)
#   MODEL          Megatron's class: gpt (GPTModel) or hybrid (HybridModel)            (default: gpt)
#   TP, PP, EP, CP           tensor, pipeline, expert and context parallel sizes      (default: 1)
#   VPP            virtual stages of each pipeline rank                               (default: 1)
#   NNODES or SLURM_NNODES, NODE_RANK, RANK or SLURM_NODEID, MASTER_ADDR, MASTER_PORT (default: one node)
#   KERNELS=triton kernels beyond PyTorch's that no card has run yet                  (default: none of them)
#   OUTPUT_DIR     checkpoints, TensorBoard, log and command of this run              (default: runs/<name>)
#   WANDB_API_KEY  when set, figures also go to Weights & Biases
#   CUDA_DEVICE_MAX_CONNECTIONS, PYTORCH_CUDA_ALLOC_CONF     for GPUs                   (default: see set_settings)
#   PYTHON         the interpreter                                                    (default: .venv's, else python3)
#   DRY_RUN=1      print the command for GPUs and what training will cost, data or not; DRY_RUN=command: the command
#   REHEARSE=1     play the training on GPUs that are not there, data or not: whether it starts, memory, waits, launches
#   GPU, UTILIZATION         for these: the kind of GPU and, in a dry run, the share of its rate    (default: h100, 0.4)
#   REHEARSE_JSON  a file for the rehearsal's figures

LAUNCH_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=scripts/lib/help.sh
source "$LAUNCH_ROOT/scripts/lib/help.sh"
# shellcheck source=scripts/lib/data.sh
source "$LAUNCH_ROOT/scripts/lib/data.sh"
# shellcheck source=scripts/lib/gpus.sh
source "$LAUNCH_ROOT/scripts/lib/gpus.sh"

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# set_model SIZE: the paper's table of sizes, and how often the authors' fork saves each.
set_model() {
  case $1 in
    182m) LAYERS=12 HIDDEN=768 HEADS=12 SAVE_INTERVAL=5000 ;;
    469m) LAYERS=24 HIDDEN=1024 HEADS=16 SAVE_INTERVAL=5000 ;;
    978m) LAYERS=24 HIDDEN=1536 HEADS=16 SAVE_INTERVAL=2500 ;;
    *) die "size $1: choose 182m, 469m or 978m" ;;
  esac
}

whole_number() { # NAME VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 is '$2': give a whole number of at least 1"
}

# Whether the training is only planned, for GPUs on any machine.
is_planned() { [[ ${DRY_RUN:-0} != 0 || ${REHEARSE:-0} != 0 ]]; }

find_interpreter() {
  if [[ -z ${PYTHON-} ]]; then
    PYTHON=python3
    if [[ -x $LAUNCH_ROOT/.venv/bin/python ]]; then PYTHON=$LAUNCH_ROOT/.venv/bin/python; fi
  fi
}

set_layout_flags() {
  local tp=${TP:-1} pp=${PP:-1} vpp=${VPP:-1} ep=${EP:-1} cp=${CP:-1} world
  for pair in "TP $tp" "PP $pp" "VPP $vpp" "EP $ep" "CP $cp"; do whole_number "${pair% *}" "${pair#* }"; done
  world=$((GPUS_PER_NODE * NODES))
  ((world % (tp * pp * cp) == 0)) || die "$world processes cannot be split into TP=$tp x PP=$pp x CP=$cp"
  ((HEADS % tp == 0)) || die "TP=$tp does not divide the $HEADS attention heads"
  ((pp > 1 || vpp == 1)) || die "VPP=$vpp cuts pipeline stages, and PP=$pp: set PP to at least 2, or leave VPP unset"
  ((LAYERS % (pp * vpp) == 0)) || die "PP=$pp x VPP=$vpp does not divide the $LAYERS layers"
  LAYOUT=(--tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" --context-parallel-size "$cp")
  if ((tp > 1)); then LAYOUT+=(--sequence-parallel); fi
  if [[ $ROUTING != dense ]]; then
    ((EXPERTS * GRANULARITY % ep == 0)) || die "EP=$ep does not divide the $((EXPERTS * GRANULARITY)) experts"
    LAYOUT+=(--expert-model-parallel-size "$ep")
  fi
}

# The layers as MODEL's class takes them: their number, or a pattern of attention and MLP, cut by | into pipeline stages.
set_layer_flags() { # MEGATRON FLAGS, those behind --
  local pp=${PP:-1} vpp=${VPP:-1} layer="*E" stage pattern
  case ${MODEL:-gpt} in
    gpt)
      DEPTH=(--num-layers "$LAYERS")
      if ((vpp > 1)); then DEPTH+=(--num-virtual-stages-per-pipeline-rank "$vpp"); fi
      ;;
    hybrid)
      [[ " $* " != *" --num-layers"[\ =]* ]] || die "MODEL=hybrid takes no --num-layers: give --hybrid-layer-pattern," \
        "as '*E*E' for two layers with experts, or '*-*-' without"
      if [[ $ROUTING == dense ]]; then layer="*-"; fi
      printf -v stage "%.0s$layer" $(seq $((LAYERS / pp / vpp)))
      printf -v pattern "%.0s$stage|" $(seq $((pp * vpp)))
      DEPTH=(--hybrid-layer-pattern "${pattern%|}")
      ;;
    *) die "MODEL=$MODEL: choose gpt or hybrid" ;;
  esac
}

set_routing_flags() {
  case $ROUTING in
    dense) MIXTURE=() ;;
    moe)
      MIXTURE=(--num-experts "$EXPERTS" --moe-router-topk 1 --moe-granularity "$GRANULARITY" --moe-ffn-hidden-size "$FFN")
      MIXTURE+=(--moe-token-dispatcher-type alltoall --moe-router-pre-softmax)
      MIXTURE+=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2)
      ;;
    remoe)
      MIXTURE=(--num-experts "$EXPERTS" --moe-router-topk 1 --moe-granularity "$GRANULARITY" --moe-ffn-hidden-size "$FFN")
      MIXTURE+=(--moe-token-dispatcher-type alltoall --moe-relu-routing)
      ;;
    *) die "routing $ROUTING: choose dense, moe or remoe" ;;
  esac
}

# Prints the script's header and the list of environment variables above.
print_usage() {
  print_header
  echo
  sed -n '/^# Environment/,/^$/ s/^# \{0,1\}//p' "$LAUNCH_ROOT/scripts/lib/launch.sh"
}

# launch SIZE ROUTING [positional arguments of the script] [-- Megatron flags]
launch() {
  local size=$1 name positional=()
  ROUTING=$2
  shift 2
  while (($#)) && [[ $1 != -- ]]; do
    positional+=("$1")
    shift
  done
  if asks_for_help "${positional[@]}"; then print_usage && exit; fi
  if (($#)); then shift; fi # what is left goes to Megatron unchanged, behind all else, and wins

  set_model "$size"
  GPUS_PER_NODE=${positional[0]:-8}
  local train_iters=${positional[1]:-60000} micro_batch_size=${positional[2]:-16}
  local project most=6
  EXPERTS=8 GRANULARITY=1 FFN=$((HIDDEN * 4)) NOTES=() # what is said where nothing is wrong
  if [[ $ROUTING == dense ]]; then
    local expansion=${positional[3]:-1}
    whole_number ffn_expansion "$expansion"
    FFN=$((HIDDEN * 4 * expansion)) project=${positional[4]:-remoe} most=5
    name=llama_${size}_dense_ffn$((4 * expansion)) # over the hidden size
    NOTES+=("FFN: $FFN = $expansion x 4 x $HIDDEN")
  else
    EXPERTS=${positional[3]:-8} GRANULARITY=${positional[4]:-1} project=${positional[5]:-remoe}
    name=llama_${size}_${ROUTING}_e${EXPERTS}g${GRANULARITY}
  fi
  [[ $project != */* ]] || die "project_name is '$project': it becomes part of a folder's name; give it without /"
  if [[ $project != remoe ]]; then name+=_$project; fi
  ((${#positional[@]} <= most)) || die "too many arguments: ${positional[*]:most}. Put Megatron's flags behind --"
  NODES=${NNODES:-${SLURM_NNODES:-1}}
  local number
  for number in "gpus_per_node $GPUS_PER_NODE" "train_iters $train_iters" "micro_batch_size $micro_batch_size" \
    "num_experts $EXPERTS" "granularity $GRANULARITY" "NNODES $NODES"; do
    whole_number "${number% *}" "${number#* }"
  done

  find_interpreter
  find_data
  find_vocabulary "$@"
  set_kernel_flags
  set_routing_flags
  set_layout_flags
  set_layer_flags "$@"
  set_hardware_flags "$@"
  local output=${OUTPUT_DIR:-$LAUNCH_ROOT/runs/$name}

  local command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NODES")
  if ((NODES > 1)); then
    [[ -n ${MASTER_ADDR-} ]] || die "NNODES=$NODES needs MASTER_ADDR, the first node's name"
    local rank=${NODE_RANK:-${RANK:-${SLURM_NODEID:-0}}}
    [[ $rank =~ ^[0-9]+$ && $rank -lt $NODES ]] || die "the node's rank (NODE_RANK, RANK or SLURM_NODEID) is '$rank':" \
      "give a number below NNODES=$NODES"
    command+=(--node-rank "$rank" --master-addr "$MASTER_ADDR")
    command+=(--master-port "${MASTER_PORT:-29500}")
  else
    command+=(--standalone)
  fi
  command+=("$LAUNCH_ROOT/pretrain_gpt.py")
  local flags=(
    "${DEPTH[@]}" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS" --ffn-hidden-size "$FFN"
    --group-query-attention --num-query-groups 4 --seq-length 1024 --max-position-embeddings 1024
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 1000000 --attention-dropout 0 --hidden-dropout 0
    --init-method-std 0.01 --make-vocab-size-divisible-by 1024
    --micro-batch-size "$micro_batch_size" --global-batch-size 512 --train-iters "$train_iters"
    --lr 5e-4 --min-lr 5e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01
    --adam-beta1 0.9 --adam-beta2 0.999 --weight-decay 0.01 --clip-grad 1.0
    "${TOKENIZER[@]}" --data-path "${DATA_FLAGS[@]}" --split "969,30,1"
    --eval-interval 1000 --eval-iters 100
    --save "$output/checkpoints" --load "$output/checkpoints" --save-interval "$SAVE_INTERVAL" --exit-signal-handler
    --tensorboard-dir "$output/tensorboard" --log-interval 10 --log-throughput
    "${MIXTURE[@]}" "${LAYOUT[@]}" "${HARDWARE[@]}" "${FAST[@]}")
  if [[ -n ${WANDB_API_KEY-} ]]; then
    flags+=(--wandb-project "$project" --wandb-exp-name "$name" --wandb-save-dir "$output")
  fi
  flags+=("$@")
  command+=("${flags[@]}")
  set_settings "${flags[@]}"
  if ((${#SETTINGS[@]})); then command=(env "${SETTINGS[@]}" "${command[@]}"); fi
  if [[ -n $ENGINE ]]; then NOTES+=("Layers: $ENGINE"); fi
  if ((${#FAST[@]})); then NOTES+=("KERNELS=triton: ${FAST[*]}, not run on a card yet"); fi
  if ((${#NOTES[@]})); then printf '%s\n' "${NOTES[@]}" >&2; fi

  if [[ ${DRY_RUN:-0} != 0 ]]; then
    quoted "${command[@]}"
    echo
    [[ $DRY_RUN != command ]] || return 0
    echo
    "$PYTHON" "$LAUNCH_ROOT/tools/cost" --gpus $((GPUS_PER_NODE * NODES)) --gpu "${GPU:-h100}" \
      --utilization "${UTILIZATION:-0.4}" --paper "$size" "$ROUTING" -- "${flags[@]}"
    return
  fi
  if [[ ${REHEARSE:-0} != 0 ]]; then
    env "${SETTINGS[@]}" "$PYTHON" "$LAUNCH_ROOT/tools/rehearse" --gpus $((GPUS_PER_NODE * NODES)) \
      --gpus-per-node "$GPUS_PER_NODE" --gpu "${GPU:-h100}" ${REHEARSE_JSON:+--json "$REHEARSE_JSON"} -- "${flags[@]}"
    return
  fi
  mkdir -p "$output" 2>/dev/null && [[ -w $output ]] || die "OUTPUT_DIR=$output cannot be written"
  quoted "${command[@]}" >"$output/command.sh"
  echo "Run: $output (log, command, checkpoints, tensorboard)"
  run_training "$output/train.log" "${command[@]}"
}

# run_training LOG COMMAND...: SIGTERM and Ctrl-C have the training save a checkpoint and end, here with code 143. A second
# Ctrl-C kills it; a second SIGTERM does not, for schedulers send several. The job gets a process group of its own, so that a
# terminal's Ctrl-C comes in this way only.
run_training() {
  local log=$1 job status=0
  shift
  set -m
  (
    trap '' INT TERM # for the log, which is kept to the last line, and for torchrun, which would limit the time for saving
    PET_SIGNALS_TO_HANDLE=SIGHUP "$@" </dev/null 2>&1 | tee -a "$log"
  ) &
  job=$!
  set +m
  STOPPING=""
  trap 'stop_training "$job" TERM' TERM
  trap 'stop_training "$job" INT' INT
  while kill -0 "$job" 2>/dev/null; do
    wait "$job" && status=0 || status=$?
  done
  trap - INT TERM
  [[ -n $STOPPING ]] || return "$status"
  echo "Stopped. The same command goes on from the last checkpoint; the log is $log"
  return 143
}

stop_training() { # JOB SIGNAL
  local signal=TERM launcher
  if [[ -n $STOPPING ]]; then
    [[ $2 == INT ]] || return 0
    signal=KILL
  else
    echo "Saving a checkpoint; a second Ctrl-C ends at once, without one."
  fi
  STOPPING=yes
  for launcher in $(pgrep -P "$1" || true); do # the training processes, in sessions of their own, are torchrun's children
    pkill "-$signal" -P "$launcher" || true
  done
}

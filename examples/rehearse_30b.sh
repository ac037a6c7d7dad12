#!/usr/bin/env bash
# Rehearse the 30B ReMoE of docs/gpu.md: bash examples/rehearse_30b.sh GPUS [FLAG...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/python.sh"
answer_help "$@"
gpus=${1:?give the number of GPUS, such as 64}
shift
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
shape="--num-layers 48 --hidden-size 2048 --num-attention-heads 32 --group-query-attention --num-query-groups 4
  --kv-channels 128 --ffn-hidden-size 6144 --moe-ffn-hidden-size 768 --num-experts 128 --moe-router-topk 8
  --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
  --position-embedding-type rope --rotary-base 1000000 --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
  --make-vocab-size-divisible-by 1024 --tokenizer-type NullTokenizer --vocab-size 151643
  --moe-relu-routing --moe-token-dispatcher-type alltoall"
training="--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --lr 3e-4 --min-lr 3e-5
  --lr-decay-style cosine --clip-grad 1.0 --bf16 --use-distributed-optimizer --overlap-grad-reduce
  --overlap-param-gather --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
  --no-masked-softmax-fusion --no-rope-fusion"
layout="--pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
  --global-batch-size $gpus"
# shellcheck disable=SC2086 # each of them is a list of words
run_tool rehearse --gpus "$gpus" -- $shape $training $layout "$@"

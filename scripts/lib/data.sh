# shellcheck shell=bash
# Sourced by launch.sh: the data sets and the vocabulary of a training, from its environment.

# Puts DATA_PATH into DATA_FLAGS: one prefix, or words, or lines of "[weight] prefix".
split_data_path() {
  local line word
  if [[ -f $DATA_PATH.bin ]]; then
    DATA_FLAGS=("$DATA_PATH")
  elif [[ $DATA_PATH == *$'\n'* ]]; then
    while read -r line; do
      if [[ $line =~ ^([0-9.]+)[[:blank:]]+(.*)$ ]]; then DATA_FLAGS+=("${BASH_REMATCH[1]}") line=${BASH_REMATCH[2]}; fi
      if [[ -n $line ]]; then DATA_FLAGS+=("$line"); fi
    done <<<"$DATA_PATH"
  else
    read -ra DATA_FLAGS <<<"$DATA_PATH"
    if is_planned || ((${#DATA_FLAGS[@]} < 2)); then return; fi
    for word in "${DATA_FLAGS[@]}"; do
      [[ -f $word.bin || $word == *://* || $word =~ ^[0-9.]+$ ]] || die "DATA_PATH is split at blanks, and there is no" \
        "$word.bin. If a prefix has blanks, give each data set a line of its own: [weight] prefix"
    done
  fi
}

# Puts the data sets in DATA_DIR into DATA_FLAGS, with weights of 1.0. Of a whole Pile the authors' fork trains on shards
# 01 to 29; shard 00 is left out then, and every shard that is missing is named.
find_data_sets() {
  local file number here rest pile=() found=() left=() missing=()
  for file in "$DATA_DIR"/*_document.bin; do
    if [[ -f $file ]]; then found+=("${file%.bin}"); fi
  done
  ((${#found[@]})) || die "no *_document.bin in DATA_DIR=$DATA_DIR: make them with tools/preprocess_data.py"
  for number in $(seq -f %02g 0 29); do
    here=()
    for file in "$DATA_DIR"/{pile_,}"${number}_text_document"; do
      if [[ -f $file.bin ]]; then here+=("$file"); fi
    done
    ((${#here[@]} < 2)) || die "DATA_DIR=$DATA_DIR has shard $number twice, as ${number}_text_document and as" \
      "pile_${number}_text_document, and both would be trained on. Move one of them away"
    if ((${#here[@]} == 0)); then missing+=("$number"); elif [[ $number != 00 ]]; then pile+=("${here[@]}"); fi
  done
  if ((${#pile[@]} == 29)); then
    for file in "${found[@]}"; do
      if [[ ! $file =~ /(pile_)?(0[1-9]|[12][0-9])_text_document$ ]]; then left+=("${file##*/}"); fi
    done
    if ((${#left[@]})); then NOTES+=("Data: the Pile's shards 01 to 29; left out: ${left[*]}"); fi
    found=("${pile[@]}")
  elif ((${#pile[@]})); then
    rest="the others are trained on"
    if [[ ${missing[0]} != 00 ]]; then rest+=", shard 00 too, which the fork leaves out"; fi
    NOTES+=("Data: of the Pile's shards 00 to 29 these are missing: ${missing[*]}; $rest")
  fi
  if ((${#found[@]} == 1)); then DATA_FLAGS=("${found[@]}") && return; fi
  for file in "${found[@]}"; do DATA_FLAGS+=(1.0 "$file"); done
}

# Puts weights and prefixes of the data into DATA_FLAGS.
find_data() {
  DATA_FLAGS=()
  if [[ -n ${DATA_PATH-} ]]; then
    split_data_path
  elif [[ -n ${DATA_DIR-} ]]; then
    find_data_sets
  elif [[ ${REHEARSE:-0} != 0 ]]; then
    DATA_FLAGS=(made-up)
  elif [[ ${DRY_RUN:-0} != 0 && $DRY_RUN != command ]]; then
    DATA_FLAGS=(PREFIX)
    NOTES+=("Data: none are set; PREFIX in the command stands for DATA_PATH, or for what is in DATA_DIR")
  else
    die "no data: set DATA_PATH to a prefix of .bin/.idx, or DATA_DIR to a folder of them"
  fi
}

# Prints the first file that exists, else the first.
first_file() {
  local file
  for file in "$@"; do
    if [[ -f $file ]]; then break; fi
    file=$1
  done
  printf '%s' "$file"
}

# Puts the tokenizer's flags into TOKENIZER, unless Megatron flags choose another tokenizer.
find_vocabulary() {
  local folder=${DATA_DIR-.} vocabulary merges
  vocabulary=${VOCAB_FILE:-$(first_file "$folder"/encoder.json "$folder"/{,../}gpt2-vocab.json)}
  merges=${MERGE_FILE:-$(first_file "$folder"/vocab.bpe "$folder"/{,../}gpt2-merges.txt)}
  TOKENIZER=()
  if [[ " $* " == *" --tokenizer-type "* ]]; then return; fi
  if ! is_planned; then
    [[ -f $vocabulary ]] || die "VOCAB_FILE: there is no $vocabulary (GPT-2's encoder.json or gpt2-vocab.json)"
    [[ -f $merges ]] || die "MERGE_FILE: there is no $merges (GPT-2's vocab.bpe or gpt2-merges.txt)"
  fi
  # shellcheck disable=SC2034 # launch.sh reads it
  TOKENIZER=(--tokenizer-type GPT2BPETokenizer --vocab-file "$vocabulary" --merge-file "$merges")
}

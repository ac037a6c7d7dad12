#!/usr/bin/env bash
# Rehearse the first ten minutes of the acceptance on a machine like that of the first card: only the image's packages,
# the tracked files and three wheels, empty caches, no package index, the CUDA that does nothing. Fails if the first
# speeds are missing at the end. Figures go to FOLDER/figures; later arguments go to pytest.
#   bash tests/gpu/cold.sh FOLDER       FOLDER/image is made by the first call (5 GB) and kept, all else is made again
#   IMAGE_PYTHON=python3.12             makes the image
#   MINUTES=10                          the limit; give more on a busy machine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(realpath -m "${1:?usage: bash tests/gpu/cold.sh FOLDER}")
image=$folder/image

if [[ ! -x $image/bin/pytest ]]; then
  "${IMAGE_PYTHON:-python3.12}" -m venv "$image"
  # The last two are headers of the stand-in, which a card does not need.
  "$image/bin/pip" install --quiet torch==2.11.0 triton==3.6.0 filelock==3.29.0 numpy pytest pytest-timeout psutil \
    einops transformers tensorboard rich 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*'
fi
rm -rf "${folder:?}"/{carried,checkout,home,figures}
"$image/bin/pip" download --quiet --no-deps --dest "$folder/carried" megatron-core==0.19.2 fla-core filelock
mkdir -p "$folder"/{checkout,home}
git ls-files -z | tar --create --null --files-from - | tar --extract --directory "$folder/checkout"

status=0
env --ignore-environment PATH="$PATH" HOME="$folder/home" PIP_NO_INDEX=1 REHEARSE=1 PYTHON="$image/bin/python" \
  CARRIED="$folder/carried" OUT="$folder/figures" timeout "${MINUTES:-10}m" \
  bash "$folder/checkout/scripts/gpu_acceptance.sh" --timeout 0 --durations 20 "${@:2}" || status=$?
echo "The acceptance ended with $status (124: at its limit). CPU time of the shell, and of all that it started:"
times
missing=()
for name in launch-{182m-{remoe-{triton,torch},dense-triton,moe-triton},978m-remoe-triton-num-layers-12,469m-remoe-triton}; do
  compgen -G "$folder/figures/*/$name-steady.json" >/dev/null || missing+=("$name-steady")
done
echo "First figures that are missing: ${missing[*]:-none}"
[[ ${#missing[@]} == 0 && ( $status == 0 || $status == 124 ) ]]

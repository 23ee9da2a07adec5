#!/bin/sh
# SDXL's base model and the refiner as one file each. Sequential offloading moves single layers to the GPU as they are
# needed: little GPU memory, and much more time.
#
#   deploy/start-refiner.sh
#   IMAGE=sdxl-runtime:0.1.0 MODELS=/data/models deploy/start-refiner.sh --device cuda
set -eu
# shellcheck source=deploy/start.sh
. "$(dirname "$(readlink -f "$0")")/start.sh"

run --model_name sdxl \
    --single_file_model "$models/sd_xl_base_1.0.safetensors" \
    --use_refiner true \
    --refiner_single_file_model "$models/sd_xl_refiner_1.0.safetensors" \
    --device enable_sequential_cpu_offload \
    "$@"

#!/bin/sh
# SDXL's base model as one file. Its parts wait in main memory and take turns on the GPU, of which 8 GB are enough.
#
#   deploy/start-base.sh
#   IMAGE=sdxl-runtime:0.1.0 MODELS=/data/models deploy/start-base.sh --max_queue 16
set -eu
# shellcheck source=deploy/start.sh
. "$(dirname "$(readlink -f "$0")")/start.sh"

run --model_name sdxl \
    --single_file_model "$models/sd_xl_base_1.0.safetensors" \
    --device enable_model_cpu_offload \
    "$@"

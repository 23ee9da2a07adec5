#!/bin/sh
# FLUX.1 [schnell] from the Hugging Face hub, which wants a token of somebody who agreed to the model's terms.
#
#   HF_TOKEN=... deploy/start-flux.sh
#   HF_TOKEN=... IMAGE=sdxl-runtime:0.1.0 deploy/start-flux.sh
set -eu
# shellcheck source=deploy/start.sh
. "$(dirname "$(readlink -f "$0")")/start.sh"

# The image asks the hub for nothing unless told to.
HF_HUB_OFFLINE=0
export HF_HUB_OFFLINE

run --model_name flux \
    --model_type flux \
    --model_id black-forest-labs/FLUX.1-schnell \
    --device enable_model_cpu_offload \
    "$@"

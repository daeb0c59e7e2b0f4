#!/usr/bin/env bash
# GRPO of Qwen2.5-VL-3B on hour-long videos, 3,600 frames each, on one node of 8 GPUs with 80 GB.
#
#   launch/grpo_qwen2_5_vl_1h_8xa100.sh MODEL_PATH DATA [section.key=value ...]
#
# MODEL_PATH  checkpoint folder (config.json, tokenizer, preprocessor and safetensors side by side)
# The rest is as in grpo_7b_8xa100.sh, which it runs with the recipe grpo_qwen2_5_vl_3b_1h.yaml.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

RECIPE=${RECIPE:-$HERE/recipes/grpo_qwen2_5_vl_3b_1h.yaml}
source "$HERE/grpo_7b_8xa100.sh"

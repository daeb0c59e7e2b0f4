"""Reinforcement learning on hour-long videos.

What flash-attn-4 and Transformer Engine read when they are imported is set here, before either. flash-attn-4 compiles a
kernel for a minute in a run's first step, unless it finds it on disk; Transformer Engine, which imports it, looks for
cuDNN below CUDNN_HOME, and below an empty one on the whole disk, for many minutes without a word.
"""

import os
import tempfile

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# Its own choice is named after the user, whom a container may not know; a folder of several machines' would mix GPUs.
os.environ.setdefault(
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"megalong_{os.getuid()}_flash_attn_4")
)
for _name in ("CUDNN_HOME", "CUDNN_PATH", "CUDA_HOME", "CUDA_PATH"):
    if os.environ.get(_name) == "":
        del os.environ[_name]

"""Reinforcement learning on hour-long videos.

flash-attn-4 compiles a kernel for a minute in a run's first step, unless it finds it on disk. It reads where when it is
imported, which Transformer Engine does, too: hence here, before either.
"""

import os
import tempfile

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# Its own choice is named after the user, whom a container may not know; a folder of several machines' would mix GPUs.
os.environ.setdefault(
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"megalong_{os.getuid()}_flash_attn_4")
)

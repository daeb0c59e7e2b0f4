"""The configuration layer runs on a laptop: importing all of it loads no torch."""

from __future__ import annotations

import subprocess
import sys


def test_config_imports_no_torch() -> None:
    script = (
        "import sys, megalong.config.load, megalong.config.validate, megalong.config.plan\n"
        "found = [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules]\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.strip() == ""
    assert done.returncode == 0

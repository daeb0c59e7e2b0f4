"""The image installs what setup.py asks for, except what NVIDIA's image brings."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[3]
FROM_THE_IMAGE = {"torch", "triton"}


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0]


def setup_requirements() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    lists = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires"]
    return set(ast.literal_eval(lists[0]))


def test_image_has_every_requirement_in_the_same_range() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("RUN pip install") and "megatron-core" in line]
    installed = {word for word in shlex.split(line) if not word.startswith("-")}
    wanted = {requirement for requirement in setup_requirements() if name_of(requirement) not in FROM_THE_IMAGE}
    assert wanted <= installed, wanted - installed


def test_nothing_may_replace_the_image_s_torch() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install ([^&;\n]*)", text)
    assert len(installs) == 4
    assert all("-c /tmp/constraint.txt" in words or "--no-deps" in words for words in installs)

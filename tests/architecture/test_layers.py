"""The shape of the package: imports point down, outside packages have one home, no print, no assert."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "megalong"
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = (
    {"config", "records"},
    {"parallel"},
    {"attention"},
    {"data", "models", "rewards", "objectives"},
    {"vision", "rollout", "engine"},
    {"evaluate"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS)  # modules right under megalong/: the loops and the command line
ALLOWED_SIDEWAYS: set[tuple[str, str]] = set()

HOMES = {
    "megatron": {"parallel", "attention", "models", "engine"},
    "transformer_engine": {"attention", "models", "engine"},
    "flash_attn": {"attention"},
    "flash_attn_3": {"attention"},
    "transformers": {"models", "rollout"},
    "tokenizers": {"models"},
    "vllm": {"rollout"},
    "triton": set(),  # kernels/megalong_kernels, outside the package
    "megalong_kernels": {"attention", "models", "objectives"},
    "av": {"data"},
    "nvidia": {"data"},
    "PyNvVideoCodec": {"data"},
    "tensorboard": {"metrics.py"},
    "torch.utils.tensorboard": {"metrics.py"},
    "wandb": {"metrics.py"},
}
TORCH_FREE = {"config"}
PRINTING = {"__main__.py"}
BANNED_NAMES = {"utils", "util", "common", "misc", "helpers"}
MAX_LINES = 400


def home(path: Path) -> str:
    """The folder under megalong/ a file is in, or its own name when it is right under megalong/."""
    return path.relative_to(ROOT).parts[0]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def upward(path: Path, tree: ast.Module) -> list[str]:
    """What a file imports from its own level or above, other than from its own folder."""
    here, found = home(path), []
    level = LEVEL.get(here, TOP)
    if level == TOP:
        return found
    for line, module in imports(tree):
        head, _, tail = module.partition(".")
        there = tail.split(".")[0]
        if head != "megalong" or not there or there == here or (here, there) in ALLOWED_SIDEWAYS:
            continue
        if LEVEL.get(there, TOP) >= level:
            found.append(f"{path}:{line}: {here} may not import megalong.{there}")
    return found


def strays(path: Path, tree: ast.Module) -> list[str]:
    """Imports of outside packages away from their home."""
    found = []
    for line, module in imports(tree):
        for package, homes in HOMES.items():
            if (module == package or module.startswith(f"{package}.")) and home(path) not in homes:
                found.append(f"{path}:{line}: {module} is imported outside {sorted(homes)}")
    return found


def test_every_folder_has_a_layer() -> None:
    folders = {path.parent.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT}
    assert folders == LEVEL.keys(), "declare new folders in LAYERS"
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_imports_point_down() -> None:
    assert [line for path in FILES for line in upward(path, parsed(path))] == []


def test_outside_packages_stay_in_their_homes() -> None:
    assert [line for path in FILES for line in strays(path, parsed(path))] == []


def test_no_relative_imports() -> None:
    relative = [
        f"{path}:{node.lineno}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_config_imports_no_torch() -> None:
    found = [
        f"{path}:{line}: {module}"
        for path in FILES
        if home(path) in TORCH_FREE
        for line, module in imports(parsed(path))
        if module.split(".")[0] in ("torch", "transformers", "megatron")
    ]
    assert found == []


def test_no_assert_in_the_package() -> None:
    found = [
        f"{path}:{node.lineno}" for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)
    ]
    assert found == [], "raise an error that says what, where and what to change"


def test_only_the_command_line_prints() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path in FILES
        if path.name not in PRINTING
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []


def test_no_exception_is_swallowed() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            if node.type is None or silent:
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_names_and_sizes_of_files() -> None:
    assert [str(path) for path in FILES if BANNED_NAMES & {path.stem, *path.parts[len(ROOT.parts) :]}] == []
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) > MAX_LINES] == []


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them as top-level modules: two of one name end the collection of the whole suite."""
    names = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert sorted(name for name, count in Counter(names).items() if count > 1) == []


def test_no_unfinished_work_markers() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
    assert [str(path) for path in FILES if marker.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("file", "line", "is_bad"),
    [
        ("data/x.py", "from megalong.models.gpt import PackGpt", True),
        ("data/x.py", "from megalong import models", True),
        ("data/x.py", "from megalong.records import Sample", False),
        ("engine/x.py", "import megalong.rollout.engine", True),
        ("engine/x.py", "import megalong.models.gpt", False),
        ("vision/x.py", "from megalong.run import Run", True),
        ("attention/x.py", "def f():\n    from megalong.engine.build import build_model", True),
        ("grpo.py", "from megalong.run import Run", False),
        ("data/x.py", "import av", False),
        ("vision/x.py", "import av.container", True),
        ("rollout/x.py", "from megatron.core import parallel_state", True),
        ("run.py", "from torch.utils.tensorboard import SummaryWriter", True),
        ("run.py", "from torch.utils import tensorboard", True),
        ("attention/x.py", "import triton.language as tl", True),
        ("engine/x.py", "from megalong_kernels import logprob", True),
    ],
)
def test_the_rules_themselves(file: str, line: str, is_bad: bool) -> None:
    path, tree = ROOT / file, ast.parse(line)
    assert bool(upward(path, tree) + strays(path, tree)) is is_bad

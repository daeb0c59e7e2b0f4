"""make: what each target would run, and the messages of an unfit Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTEST = ".venv/bin/python -m pytest -q -n 2 --dist loadfile"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(checkout: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *args], cwd=checkout, capture_output=True, text=True, check=False, timeout=30
    )


def fake_python(folder: Path, *, fails_on: str) -> str:
    path = folder / "fake-python"
    path.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\ncase "$*" in *"{fails_on}"*) exit 1;; esac\n')
    path.chmod(0o755)
    return f"PYTHON={path}"


@pytest.mark.parametrize(
    ("target", "last"),
    [
        ("demo", ["PYTHON=.venv/bin/python launch/demo.sh"]),
        ("test", [".venv/bin/ruff check .", ".venv/bin/ruff format --check .", PYTEST]),
        ("lint", [".venv/bin/ruff check .", ".venv/bin/ruff format --check ."]),
        ("check", [".venv/bin/ruff format --check .", f"{PYTEST} tests/unit"]),
    ],
)
def test_targets_make_the_environment_first(checkout: Path, target: str, last: list[str]) -> None:
    lines = make(checkout, "-n", target).stdout.splitlines()
    assert lines[-len(last) :] == last
    installs = [line for line in lines if "pip install" in line]
    assert installs == [
        ".venv/bin/python -m pip install torch==2.13.0",
        ".venv/bin/python -m pip install -e '.[test]'",
    ]


def test_a_made_environment_is_kept_until_setup_changes(checkout: Path) -> None:
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert "pip install" not in make(checkout, "-n", "lint").stdout
    newer = stamp.stat().st_mtime + 10
    os.utime(checkout / "setup.py", (newer, newer))
    assert "pip install" in make(checkout, "-n", "lint").stdout


def test_an_old_python_is_named_before_anything_is_made(checkout: Path) -> None:
    done = make(checkout, "venv", fake_python(checkout, fails_on="version_info"))
    assert done.returncode != 0
    assert "megalong needs Python 3.11 or newer" in done.stderr
    assert len((checkout / "calls").read_text().splitlines()) == 1


def test_a_python_without_venv_names_the_package(checkout: Path) -> None:
    done = make(checkout, "venv", fake_python(checkout, fails_on="ensurepip"))
    assert done.returncode != 0
    assert "python3-venv" in done.stderr
    assert "-m venv" not in (checkout / "calls").read_text()

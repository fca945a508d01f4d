"""What tests share: the real program in a process of its own, and a copy of the digits recipe to spoil."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Done:
    """How a call of the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one document on stdout; anything else there makes this fail."""
        document = json.loads(self.out)
        assert document["schema"] == 1
        return document


@dataclass(frozen=True)
class Forge:
    """The `modelforge` program with a cache of its own, run in a folder of its own."""

    home: Path
    cwd: Path

    def env(self, **extra: str) -> dict[str, str]:
        return {**os.environ, "MODELFORGE_HOME": str(self.home), **extra}

    def argv(self, *args: str | Path) -> list[str]:
        return [sys.executable, "-m", "modelforge.cli.main", *map(str, args)]

    def __call__(self, *args: str | Path, **env: str) -> Done:
        done = subprocess.run(
            self.argv(*args),
            cwd=self.cwd,
            env=self.env(**env),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    return Forge(tmp_path / "home", tmp_path)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A copy of the digits recipe that a test may change; only its x86-64 target, so that building takes seconds."""
    folder = tmp_path / "digits"
    shutil.copytree(ROOT / "recipes" / "digits", folder)
    edit_targets(folder, {"x86-64": ["fp32"]})
    return folder


def edit_targets(folder: Path, ladders: dict[str, list[str]], extra: str = "") -> None:
    """Replace the recipe's targets."""
    text = (folder / "recipe.toml").read_text()
    text = (
        text[: text.index("# One table per device")]
        if "# One table per device" in text
        else text.partition("[[target]]")[0]
    )
    for tag, ladder in ladders.items():
        text += f'[[target]]\ntag = "{tag}"\nprecision = {json.dumps(ladder)}\n{extra}\n'
    (folder / "recipe.toml").write_text(text)


@pytest.fixture
def edit(digits: Path) -> Callable[[str, str], None]:
    """Replace a piece of the recipe's text; the piece must be there."""

    def replace(old: str, new: str) -> None:
        path = digits / "recipe.toml"
        text = path.read_text()
        assert old in text, f"{old!r} is not in the recipe"
        path.write_text(text.replace(old, new))

    return replace

"""How long the digits recipe takes: cold, again with nothing changed, and refused for several kinds of bad input.

    nox -s bench        # or: python benchmarks/rebuild.py [rounds]

Whole processes. The limits are 1 s for a rebuild and 2 s for a refusal (shared design); medians over the rounds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).parent.parent / "recipes" / "digits"
REBUILD_LIMIT, REFUSAL_LIMIT = 1.0, 2.0


def main(rounds: int = 9) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = {**os.environ, "MODELFORGE_HOME": str(folder / "home")}
        cold, code = build(DIGITS, folder, home)
        assert code == 0, "the digits recipe must build"
        print(f"cold build, four targets    {cold:6.2f} s  (once; the arm64 runtime is fetched in it)")
        warm = statistics.median(build(DIGITS, folder, home)[0] for _ in range(rounds))
        print(
            f"again, nothing changed      {warm:6.2f} s  = {warm / REBUILD_LIMIT:.2f} of the limit of {REBUILD_LIMIT} s"
        )
        print(f"\nrefusals (median of {rounds}; limit {REFUSAL_LIMIT} s):")
        for title, spoil in FAULTS.items():
            recipe = folder / "spoilt"
            shutil.rmtree(recipe, ignore_errors=True)
            shutil.copytree(DIGITS, recipe)
            spoil(recipe)
            empty = {**os.environ, "MODELFORGE_HOME": str(folder / "none")}
            found = [build(recipe, folder, empty) for _ in range(rounds)]
            median = statistics.median(seconds for seconds, _ in found)
            print(f"  {title:<28}{median:5.2f} s  = {median / REFUSAL_LIMIT:.2f} of it, exit {found[0][1]}")


def build(recipe: Path, folder: Path, env: dict[str, str]) -> tuple[float, int]:
    argv = [sys.executable, "-m", "modelforge.cli.main", "build", str(recipe), "-o", str(folder / "dist"), "--quiet"]
    begun = time.perf_counter()
    done = subprocess.run(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - begun, done.returncode


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(recipe: Path) -> None:
        path = recipe / "recipe.toml"
        path.write_text(path.read_text().replace(old, new))

    return change


def nan(recipe: Path) -> None:
    arrays = dict(np.load(recipe / "evaluation.npz"))
    arrays["x"][57] = np.nan
    np.savez(recipe / "evaluation.npz", **arrays)


FAULTS: dict[str, Callable[[Path], None]] = {
    "no model": lambda recipe: (recipe / "model.onnx").unlink(),
    "a text file named .onnx": lambda recipe: (recipe / "model.onnx").write_text("hello " * 100) and None,
    "unknown key": edit("max_drop", "max_dorp"),
    "unknown target": edit('"t4"', '"t5"'),
    "wrong input name": edit("[inputs.x]", "[inputs.y]"),
    "wrong shape": edit('"batch", 1, 8, 8', '"batch", 1, 9, 8'),
    "NaN in sample 57": nan,
    "no compiler for the target": edit('tag       = "t4"', 'tag       = "ascend-310p3"'),
}


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))

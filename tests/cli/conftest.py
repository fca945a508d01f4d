"""Two really built bundles, for the commands of a deployer: the digits recipe in FP32, and then in INT8.

The first has a TensorRT-RTX engine too, where that is installed: it is built without a GPU.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelforge.compilers import get_compiler
from modelforge.compilers.protocol import Toolchain
from tests.conftest import ROOT, Forge, edit_targets


@dataclass(frozen=True)
class Built:
    """``first`` is digits 1.0.0 in FP32, ``second`` is 1.1.0 in INT8; ``forge`` runs commands beside them."""

    forge: Forge
    first: Path
    second: Path
    has_t4: bool

    def require_t4(self) -> None:
        if not self.has_t4:
            pytest.skip("tensorrt-rtx is not installed, which builds the variant for the T4")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("deployed")
    forge = Forge(folder / "home", folder)
    recipe = folder / "digits"
    shutil.copytree(ROOT / "recipes" / "digits", recipe)
    has_t4 = isinstance(get_compiler("tensorrt-rtx").probe(), Toolchain)
    first = {"x86-64": ["fp32"]} | ({"t4": ["fp16"]} if has_t4 else {})
    for version, ladders in (("1.0.0", first), ("1.1.0", {"x86-64": ["int8", "fp32"]})):
        edit_targets(recipe, ladders)
        text = (recipe / "recipe.toml").read_text().replace('version = "1.0.0"', f'version = "{version}"')
        (recipe / "recipe.toml").write_text(text)
        done = forge("build", recipe)
        assert done.code == 0, done.err
    return Built(forge, folder / "dist/digits-1.0.0", folder / "dist/digits-1.1.0", has_t4)

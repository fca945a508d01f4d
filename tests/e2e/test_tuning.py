"""A device that is not there any more costs the tuning of its target, and nothing else of a build."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from tests.conftest import ROOT, Forge, edit_targets


def test_a_dead_device_costs_the_tuning_of_its_target_only(tmp_path: Path) -> None:
    forge = Forge(tmp_path / "home", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert forge("devices", "add", "gone", f"127.0.0.1:{port}", "k").code == 0
    recipe = tmp_path / "digits"
    shutil.copytree(ROOT / "recipes" / "digits", recipe, ignore=shutil.ignore_patterns("dist"))
    edit_targets(recipe, {"cortex-a76": ["fp32"], "neoverse-n1": ["fp32"]}, "required = false")
    tune = '[target.tune]\ntrials = 2\ndevice = "gone"\n'
    text = (recipe / "recipe.toml").read_text(encoding="utf-8")
    before, tag, last = text.partition('[[target]]\ntag = "neoverse-n1"')
    (recipe / "recipe.toml").write_text(f"{before}{tune}{tag}{last}{tune}required = true\n", encoding="utf-8")
    done = forge("build", recipe, "--json")
    assert done.code == 0, done.err
    records = {record["target"]: record for record in done.json["variants"]}
    assert {tag: record["status"] for tag, record in records.items()} == {
        "cortex-a76": "compiled",
        "neoverse-n1": "failed",
    }
    assert any("not tuned: " in note and "gone cannot be reached" in note for note in records["cortex-a76"]["notes"])
    assert "gone cannot be reached" in str(records["neoverse-n1"]["ladder"]) + str(records["neoverse-n1"]["notes"])

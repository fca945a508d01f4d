"""Qualcomm through the whole way on the digits recipe: calibrated, lowered, compiled, emulated, gated, bundled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelforge.bundle.read import open_bundle
from tests.conftest import Forge, edit_targets

pytestmark = pytest.mark.qualcomm


@pytest.mark.slow  # builds and emulates: twenty seconds and more
def test_digits_for_qualcomm(qualcomm_home: Path, digits: Path, tmp_path: Path) -> None:
    forge = Forge(qualcomm_home, tmp_path)
    edit_targets(digits, {"qualcomm-htp-v73": ["int8", "fp16"]})
    planned = forge("plan", digits, "--json").json
    assert [step["step"] for step in planned["steps"]].count("compile") == 2
    done = forge("build", digits, "--json")
    assert done.code == 0, done.err
    bundle = open_bundle(tmp_path / "dist" / "digits-1.0.0")
    (variant,) = bundle.select("qualcomm-htp-v73")
    record = variant.record
    assert (record.status, record.precision, record.compiler) == ("compiled", "int8", "qualcomm")
    assert (record.accuracy.evidence, record.accuracy.gate, record.accuracy.samples) == ("emulator", "passed", 360)
    assert record.accuracy.sqnr_db is not None
    assert record.accuracy.sqnr_db > 25
    assert record.runtime is not None
    assert record.to_json()["runtime"]["needs"] == {"qnn": ">=2.51", "htp_arch": 73, "soc_model": 43}
    assert record.toolchain["onnxruntime-qnn"] == "2.7.0"
    gears = json.loads(bundle.file(variant, "qualcomm.json").read_bytes())["gears"]
    assert [gear["batch"] for gear in gears] == [1, 4, 8]
    for gear in gears:
        assert bundle.file(variant, gear["context"]).stat().st_size > 10_000
    again = forge("build", digits, "--json")
    assert again.json["digest"] == done.json["digest"]


def test_an_unknown_chip_is_refused_before_anything_runs(digits: Path, forge: Forge) -> None:
    (digits / "targets").mkdir()
    profile = (Path(__file__).parents[3] / "targets" / "qualcomm-htp-v73.toml").read_text()
    own = profile.replace("soc_model = 43", "soc_model = 4321")
    assert own != profile
    (digits / "targets" / "my-phone.toml").write_text(own)
    edit_targets(digits, {"my-phone": ["int8"]})
    done = forge("build", digits)
    assert done.code == 2
    assert "soc_model 4321 with htp_arch 73 is no SoC that is known" in done.err
    assert not forge.home.exists() or not list(forge.home.rglob("*.bin"))

"""`modelforge doctor` on machines that are not as they should be."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Forge


def test_another_pair_of_tvm_is_told_with_the_one_that_works(tmp_path: Path) -> None:
    """As after a plain `pip install apache-tvm`, which takes the newest apache-tvm-ffi."""
    newer = tmp_path / "site" / "apache_tvm_ffi-0.1.15.post2.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: apache-tvm-ffi\nVersion: 0.1.15.post2\n")
    forge = Forge(tmp_path / "home", tmp_path)
    path = str(newer.parent)
    warnings = {
        each["name"]: each.get("warnings", []) for each in forge("doctor", "--json", PYTHONPATH=path).json["compilers"]
    }
    (told,) = [each for each in warnings["tvm"] if "is not the pair that was tested" in each]
    assert "apache-tvm-ffi 0.1.15.post2" in told
    assert "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1" in told
    assert told in forge("doctor", PYTHONPATH=path).out
    assert "is not the pair that was tested" not in forge("doctor").out

"""The bill of materials: valid by CycloneDX's own schema, and true to the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from modelforge.bundle.bom import bill_of_materials
from modelforge.bundle.layout import write_bundle
from modelforge.bundle.read import Bundle, open_bundle
from tests.bundle.bundle_contents import MakeContent


@pytest.fixture
def bundle(tmp_path: Path, make_content: MakeContent) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "bundle", make_content()).path)


@pytest.fixture
def bom(bundle: Bundle) -> Any:
    return json.loads(bill_of_materials(bundle))


def test_the_schema_holds(bundle: Bundle) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(bill_of_materials(bundle).decode()) is None
    broken = bill_of_materials(bundle).decode().replace('"machine-learning-model"', '"model"')
    assert validator.validate_str(broken) is not None


def test_hashes_and_metrics_are_those_of_the_records(bundle: Bundle, bom: Any) -> None:
    whole = bom["metadata"]["component"]
    assert (whole["type"], whole["name"], whole["version"]) == ("machine-learning-model", "ppocr-cls", "1.2.0")
    assert whole["hashes"] == [{"alg": "SHA-256", "content": bundle.digest[7:]}]
    assert whole["modelCard"]["modelParameters"]["task"] == "image-classification <&> é"
    by_name = {component["name"]: component for component in bom["components"]}
    t4, record = by_name["t4"], bundle.select("t4")[0].record
    assert t4["hashes"][0]["content"] == bundle.select("t4")[0].digest[7:]
    assert t4["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "top1", "value": "0.979", "slice": "t4"},
        {"type": "top1 (fp32 reference)", "value": "0.981", "slice": "t4"},
        {"type": "top1 (drop)", "value": "0.002", "slice": "t4"},
        {"type": "sqnr_db", "value": "31.2", "slice": "t4"},
    ]
    files = {file["name"]: file for file in t4["components"]}
    assert record.artifact is not None
    assert files["main.engine"]["hashes"][0]["content"] == record.artifact.digest[7:]
    assert by_name["rk3588"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == []
    slices = {metric["slice"] for metric in whole["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert slices == {"t4", "a100"}
    assert bom["metadata"]["tools"]["components"] == [
        {"type": "application", "name": "tensorrt_rtx", "version": "1.7.1.116"}
    ]


def test_the_graph_leads_to_components_that_are_there(bundle: Bundle, bom: Any) -> None:
    references = {bom["metadata"]["component"]["bom-ref"], *(part["bom-ref"] for part in bom["components"])}
    for entry in bom["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= references
    assert bom["dependencies"][0]["dependsOn"] == [variant.digest for variant in bundle.variants]


def test_the_same_bundle_gives_the_same_bytes(bundle: Bundle, tmp_path: Path, make_content: MakeContent) -> None:
    again = open_bundle(write_bundle(tmp_path / "again", make_content()).path)
    assert bill_of_materials(again) == bill_of_materials(bundle)
    other = open_bundle(write_bundle(tmp_path / "other", make_content(version="1.3.0")).path)
    assert json.loads(bill_of_materials(other))["serialNumber"] != json.loads(bill_of_materials(bundle))["serialNumber"]

"""What is read of a bundle's report files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.read import open_bundle
from modelforge.bundle.record import VariantRecord
from modelforge.errors import InputError, IntegrityError
from modelforge.report import Report, VariantReport, collect
from modelforge.store import canonical_json
from tests.report.report_bundles import (
    WHY_KEPT,
    accuracy_document,
    build_document,
    calibration_document,
    sensitivity_document,
)

MakeBundle = Callable[..., Path]


def named(report: Report, target: str) -> VariantReport:
    return next(variant for variant in report.variants if variant.record.target == target)


def test_every_file_is_read(report: Report) -> None:
    mixed = named(report, "cortex-a76")
    assert mixed.sensitivity is not None
    assert mixed.sensitivity.chosen == 6
    assert [point.excluded for point in mixed.sensitivity.curve] == [0, 1, 2, 4, 5, 6, 8, 16]
    assert mixed.calibration is not None
    assert len(mixed.calibration.tensors) == 28
    assert mixed.outputs[0].max_abs == 0.0871
    assert mixed.latency_ms == 8.24


def test_what_is_not_there_is_none(report: Report) -> None:
    deferred = named(report, "jetson-agx-orin")
    assert (deferred.accuracy, deferred.calibration, deferred.sensitivity, deferred.build) == (None,) * 4
    assert deferred.layers == deferred.outputs == deferred.reasons == ()
    assert deferred.latency_ms is None


def test_variants_calibrated_together_share_a_digest(report: Report) -> None:
    assert named(report, "a100").calibration_digest == named(report, "cortex-a76").calibration_digest
    assert named(report, "a100").calibration_digest != named(report, "x86-64").calibration_digest


def test_rungs_join_the_record_and_the_file(report: Report) -> None:
    rungs = {rung.precision: rung for rung in named(report, "x86-64").rungs}
    assert list(rungs) == ["int8", "fp32"]
    assert rungs["int8"].sqnr_db == 30.1  # of the record
    assert rungs["int8"].latency_ms == 11.4  # of accuracy.json
    assert rungs["fp32"].identical


def test_the_record_is_believed_before_the_file(make_bundle: MakeBundle) -> None:
    said = accuracy_document(
        drop=0, sqnr=99, ladder=[{"precision": "int8", "gate": "failed", "sqnr_db": 1.0, "kept": 3}]
    )
    (rung,) = collect(open_bundle(make_bundle({"accuracy.json": said}))).variants[0].rungs
    assert (rung.gate, rung.sqnr_db, rung.kept) == ("passed", 27.9, 3)


def test_slower_than_another_rung_is_said(report: Report) -> None:
    assert named(report, "x86-64").faster_or_slower() == (("1.75x slower than fp32", "bad"),)
    assert named(report, "cortex-a76").faster_or_slower() == ()


def test_layers_kept_higher_are_grouped_by_reason(report: Report) -> None:
    kept = named(report, "cortex-a76").kept_higher()
    assert {reason: len(nodes) for reason, nodes in kept.items()} == {WHY_KEPT: 6, "a softmax loses most": 1}
    assert named(report, "a100").kept_higher() == {}
    fp16 = named(report, "t4").kept_higher()
    assert fp16["its output reaches 98,304: above what FP16 holds"] == ("p2o.Exp.0",)


def test_nodes_kept_by_the_int8_lowering(make_bundle: MakeBundle) -> None:
    lower = {"quantize": {"kept": {"a": "not weighted"}}, "fp16": {"kept": {"b": "overflows"}}}
    (variant,) = collect(open_bundle(make_bundle({"report.json": {"lower": lower}}))).variants
    assert variant.kept_higher() == {"not weighted": ("a",), "overflows": ("b",)}


def test_json_has_record_and_files(report: Report) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    mixed = next(variant for variant in document["variants"] if variant["target"] == "cortex-a76")
    assert mixed["accuracy"]["drop"] == 0.0075
    assert mixed["reports"]["sensitivity"] == sensitivity_document()
    assert mixed["reports"]["calibration"] == calibration_document(28)


DOCUMENTS: dict[str, dict[str, Any]] = {
    "accuracy.json": accuracy_document(drop=0.002, sqnr=27.9, kept=2),
    "calibration.json": calibration_document(2),
    "sensitivity.json": sensitivity_document(),
    "report.json": build_document(),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"schema": "1"}x', b'{"accuracy": NaN}'],
    ids=lambda data: repr(data[:12]),
)
def test_garbage_is_refused(make_bundle: MakeBundle, name: str, garbage: bytes) -> None:
    with pytest.raises(IntegrityError, match=name):
        collect(open_bundle(make_bundle({name: garbage})))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("accuracy.json", {"schema": 0}),
        ("accuracy.json", {"layers": [{"node": "a", "op": "Conv", "sqnr_db": "12"}]}),
        ("accuracy.json", {"layers": [{"op": "Conv"}]}),
        ("accuracy.json", {"per_output": [{"output": "y", "agreement": 1.5}]}),
        ("accuracy.json", {"reasons": [1]}),
        ("calibration.json", {"tensors": [{"name": "x", "minimum": 1.0, "maximum": 0.0, "low": 0.0, "high": 1.0}]}),
        ("calibration.json", {"samples": -1}),
        ("sensitivity.json", {"curve": [{"excluded": 1.5}]}),
        ("sensitivity.json", {"chosen": True}),
        ("report.json", {"lower": []}),
    ],
)
def test_another_shape_is_refused(make_bundle: MakeBundle, name: str, change: dict[str, Any]) -> None:
    collect(open_bundle(make_bundle({name: DOCUMENTS[name]})))
    with pytest.raises(IntegrityError, match=name):
        collect(open_bundle(make_bundle({name: DOCUMENTS[name] | change})))


@pytest.mark.parametrize(
    "bins",
    [
        {"low": 0.0, "high": 1.0, "counts": []},
        {"low": 0.0, "high": 1.0, "counts": [-1]},
        {"low": 0.0, "high": 1.0, "counts": [2**63]},
        {"low": 0.0, "high": 1.0, "counts": [0] * 5000},
        {"low": 2.0, "high": 1.0, "counts": [1]},
    ],
)
def test_bad_histograms_are_refused(make_bundle: MakeBundle, bins: dict[str, Any]) -> None:
    document = calibration_document(1)
    document["tensors"][0]["bins"] = bins
    with pytest.raises(IntegrityError, match=r"calibration\.json"):
        collect(open_bundle(make_bundle({"calibration.json": document})))


def test_keys_of_a_later_version_are_passed_over(make_bundle: MakeBundle) -> None:
    collect(open_bundle(make_bundle({"accuracy.json": DOCUMENTS["accuracy.json"] | {"later": [1, {}]}})))


def test_a_later_schema_asks_for_a_later_program(make_bundle: MakeBundle) -> None:
    with pytest.raises(InputError, match=r"later ModelForge.*sensitivity\.json"):
        collect(open_bundle(make_bundle({"sensitivity.json": sensitivity_document() | {"schema": 2}})))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_changed_blob_is_refused(make_bundle: MakeBundle, name: str) -> None:
    """`open_bundle` sees no difference: the size is the same, and it does not hash files."""
    path = make_bundle({name: DOCUMENTS[name]})
    opened = open_bundle(path)
    blob = opened.file(opened.variants[0], name)
    data = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(data.replace(b"1", b"2"))
    assert blob.read_bytes() != data
    with pytest.raises(IntegrityError, match="digest"):
        collect(open_bundle(path))


def test_a_blob_behind_a_link_is_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    opened = open_bundle(make_bundle({"accuracy.json": DOCUMENTS["accuracy.json"]}))
    blob = opened.file(opened.variants[0], "accuracy.json")
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="not a plain file"):
        collect(opened)


def test_files_of_another_role_are_no_reports(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    path.write_bytes(b"not JSON, and not ours")
    data = {"target": "t4", "status": "deferred", "compiler": None, "precision": "int8"}
    variant = VariantContent(
        VariantRecord.from_bytes(canonical_json(data), where="t4"),
        [BundleFile(path.name, "log", "text/plain", path)],
    )
    written = write_bundle(tmp_path / "bundle", BundleContent("x", "1", {}, [variant])).path
    assert collect(open_bundle(written)).variants[0].accuracy is None

"""What a report says of NPU and CPU: in a variant's card, of a partition, and with odd bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelforge.bundle.read import open_bundle
from modelforge.report import collect, render_html
from tests.report.split_bundles import stage, tensor
from tests.report.test_page import HOSTILE, Structure
from tests.report.test_stages import rows, section, texts

MakeBundle = Callable[..., Path]
DELEGATION = {
    "operators": {"npu": 173, "cpu": 4},
    "macs": {"npu": 900_000_000, "cpu": 100_000_000},
    "off_npu": ["Reshape r1", "Reshape r2", "Softmax s", "Conv odd"],
    "source": "the toolkit's table of layers, after its fusions",
}


def partitions(tag: str = "rk3588") -> dict[str, Any]:
    image = tensor("images", [1, 3, 320, 320], 1_228_800, "input")
    boxes = tensor("boxes", [1, 4, 2100], 33_600, f"stage1-{tag}-npu")
    out = tensor("output0", [1, 22, 2100], 184_800, f"stage2-{tag}-cpu")
    times = {"crossing": 0.0003, "npu": 0.0056, "cpu": 0.026, "saved": 0.0201}
    accuracy = {"metric": "agreement", "reference": 1.0, "value": 0.9945, "drop": 0.0055, "gate": "passed"}
    members = [{"stage": f"stage1-{tag}-npu", "target": tag, "evidence": "simulator"}]
    members.append({"stage": f"stage2-{tag}-cpu", "target": tag, "evidence": "emulator"})
    return {
        tag: {
            "schema": 1, "method": "support", "sizes": {}, "notes": [], "transport": {},
            "stages": [stage(f"stage1-{tag}-npu", [image], [boxes], 322, 2_050_089_443, 12_037_248),
                       stage(f"stage2-{tag}-cpu", [boxes], [out], 1, 0, 0)],
            "outputs": [{"name": "output0", "from": f"stage2-{tag}-cpu"}],
            "chains": [{"stages": members, "accuracy": accuracy}],
            "costs": [{"stage": f"stage1-{tag}-npu", "tensors": 3, "bytes": 1_413_600, "seconds": times}],
        }
    }  # fmt: skip


def page_of(bundle: Path) -> str:
    return render_html(collect(open_bundle(bundle)))


def test_a_card_says_what_runs_where(make_bundle: MakeBundle) -> None:
    page = page_of(make_bundle({}, delegation=DELEGATION))
    assert rows(page, "Where t4 runs") == [
        ["NPU", "173", "97.74 %", "900M", "90 %"],
        ["CPU", "4", "2.26 %", "100M", "10 %"],
    ]
    said = texts(page)
    assert "4 operators not on the NPU" in said
    assert "Conv odd" in said
    assert "Known from: the toolkit's table of layers" in said


def test_what_is_not_known_is_no_zero(make_bundle: MakeBundle) -> None:
    unknown = {"operators": None, "macs": None, "source": "unknown: the toolkit's log has no table of layers"}
    found = rows(page_of(make_bundle({}, delegation=unknown)), "Where t4 runs")
    assert [row[0] for row in found] == ["NPU", "CPU"]
    assert not any(cell[:1].isdigit() for row in found for cell in row[1:])


def test_nothing_is_said_of_a_target_without_an_npu(make_bundle: MakeBundle) -> None:
    page = page_of(make_bundle({}))
    assert "NPU and CPU" not in page
    assert section(page, "partitions") == ""


def test_a_partition_is_drawn_with_what_crosses_and_what_that_costs(make_bundle: MakeBundle) -> None:
    bundle = make_bundle({}, {"partitions": partitions()}, delegation=DELEGATION, stage="stage1-rk3588-npu")
    part = section(page_of(bundle), "partitions")
    said = texts(part)
    for each in ("rk3588", "stage1-rk3588-npu", "322 layers", "boxes", "What crosses", "simulator", "emulator"):
        assert each in said
    (cost,) = rows(part, "Stages on the NPU of rk3588")
    assert cost == ["stage1-rk3588-npu", "3", "1.3 MiB", "~0.3 ms", "~5.60 ms", "~26.00 ms", "~20.10 ms"]


@pytest.mark.parametrize("wrong", [7, [], {"rk3588": 5}, {"rk3588": {"costs": 5, "stages": [{}]}}])
def test_a_partition_of_another_shape_is_left_out_and_told(make_bundle: MakeBundle, wrong: Any) -> None:
    report = collect(open_bundle(make_bundle({}, {"partitions": wrong})))
    assert any(fault.startswith("partitions") for fault in report.left_out)
    assert Structure(render_html(report)).text


def test_names_that_try_to_be_markup_are_text(make_bundle: MakeBundle) -> None:
    hostile = {"operators": {HOSTILE: 3}, "macs": {HOSTILE: 2}, "off_npu": [HOSTILE], "source": HOSTILE}
    found = partitions()
    found["rk3588"]["costs"][0]["stage"] = HOSTILE
    page = page_of(make_bundle({}, {"partitions": {HOSTILE: found["rk3588"]}}, delegation=hostile))
    clean = page_of(make_bundle({}, {"partitions": found}, delegation=DELEGATION))
    assert {tag for tag, _ in Structure(page).elements} == {tag for tag, _ in Structure(clean).elements}
    assert len([1 for tag, _ in Structure(page).elements if tag == "script"]) == 1

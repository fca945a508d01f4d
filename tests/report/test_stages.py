"""The sections on stages, tiers and placement, without a browser: what they say, and what they do with odd bundles."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelforge.bundle.read import open_bundle
from modelforge.report import Report, collect, render_html
from modelforge.report.about import read_about
from modelforge.report.page import SIZE_LIMIT
from tests.report.split_bundles import latency, named_split, split_about, stage, tensor
from tests.report.test_page import HOSTILE, Structure

MakeBundle = Callable[..., Path]


def section(page: str, name: str) -> str:
    """A section's markup; empty where there is none."""
    found = re.search(rf'<section id="{name}".*?(?=<section id="|<footer>)', page, flags=re.DOTALL)
    return found[0] if found else ""


def texts(markup: str) -> str:
    return " ".join(" ".join(Structure(markup).text).split())


def rows(markup: str, caption: str) -> list[list[str]]:
    """A table's cells as text."""
    table = markup[markup.index(caption) :].partition("</table>")[0]
    found = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], flags=re.DOTALL)
    return [[texts(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, flags=re.DOTALL)] for row in found]


@pytest.fixture(scope="module")
def page(split_report: Report) -> str:
    return render_html(split_report)


def test_the_chain_names_what_goes_between_with_bytes(page: str) -> None:
    chain = re.search(r'<ol class="chain".*?</ol>', page, flags=re.DOTALL)
    assert chain is not None
    said = texts(chain[0])
    in_order = [
        "input", "x 4.7 MiB", "head 96 layers 2.49 GFLOP", "depthwise_conv2d_3.tmp_0 350.0 KiB 87.5 KiB as INT8",
        "body", "batch_norm_9.tmp_2 150.0 KiB 37.5 KiB as INT8", "conv2d_469.tmp_0 from head 2.3 MiB 1.2 MiB as FP16",
        "shape_0 from head 32 B", "tail", "detections 9.4 KiB", "output",
    ]  # fmt: skip
    places = [said.index(each) for each in in_order]
    assert places == sorted(places)


def test_bytes_of_what_crosses_at_each_transport(page: str) -> None:
    found = {row[0]: row[4:] for row in rows(section(page, "stages"), "Tensors that cross")}
    assert found["depthwise_conv2d_3.tmp_0"] == ["350.0 KiB", "175.0 KiB", "87.5 KiB", "uint8", "0.0263", "0"]
    assert found["conv2d_469.tmp_0"][-3:] == ["float16", "–", "–"]
    assert found["shape_0"][:4] == ["32 B", "32 B", "32 B", "as it is"], "an integer is not made narrower"


def test_chains_have_evidence_accuracy_and_time(page: str) -> None:
    first, lowered, second = rows(section(page, "stages"), "Chains of variants against FP32; metric: top1")
    assert first[0] == "head on cortex-a76 device body on jetson-agx-orin reference tail on a100 reference"
    assert first[1:8] == ["passed", "~5.40 ms", "0.9861", "0.9833", "−0.0028", "0.0100", "29.4 dB"]
    assert lowered[0] == "the lowered models reference"
    assert (lowered[1], lowered[4], lowered[-1]) == ("passed", "0.9842", "5000")
    assert second[0].endswith("not run: a variant of it is missing")
    assert second[2] == "~66.00 ms", "4.1 and 61 were measured, 0.9 was not"


def test_a_chain_that_was_measured_whole_is_no_estimate(make_bundle: MakeBundle) -> None:
    about = split_about()
    about["split"]["chains"] = [{"stages": [{"stage": "head", "target": "t4"}], "reason": "not asked for"}]
    timed = latency("device", (2.0, 3.0, 5.0, 9.0), (1.0, 2.0, 3.0, 4.0))
    page = render_html(collect(open_bundle(make_bundle({}, about, stage="head", latency=timed))))
    assert rows(page, "Chains of variants against FP32")[0][2] == "2.00 ms"


def test_a_chain_that_nothing_is_known_of_the_time_of_has_no_column_for_it(make_bundle: MakeBundle) -> None:
    about = split_about()
    about["split"]["chains"] = [{**about["split"]["chains"][0], "stages": [{"stage": "head", "target": "t4"}]}]
    page = render_html(collect(open_bundle(make_bundle({}, about, stage="head"))))
    assert "one sample" not in section(page, "stages")
    assert rows(page, "Chains of variants against FP32")[0][1:3] == ["passed", "0.9861"]


def test_a_cut_that_no_candidate_gives_has_no_table_of_candidates(make_bundle: MakeBundle) -> None:
    """Between NPU and CPU it is the operators that say where."""
    about = split_about()
    taken = about["split"]["stages"][1]["inputs"][0]["name"]
    for tensor_name, shown in ((taken, True), ("another", False)):
        sizes = {"fp32": 4, "fp16": 2, "int8": 1}
        about["split"]["candidates"] = [{"tensors": [tensor_name], "flops_before": 0.5, "bytes": sizes}]
        page = render_html(collect(open_bundle(make_bundle({}, about, stage="head"))))
        assert ("Where it could be cut" in page) is shown


def test_the_change_of_a_split_model_is_that_of_its_chain(page: str) -> None:
    """A stage inside has no metric, and the last one's change is that of its own rounding alone."""
    first = rows(section(page, "deltas"), "Accuracy: loss against FP32")[0]
    assert first[0] == "chain cortex-a76, jetson-agx-orin, a100"
    assert (first[1], first[3]) == ("−0.0028", "0.0100")


def test_the_fastest_ways_are_sorted_whatever_the_bundle_says(page: str) -> None:
    found = rows(section(page, "stages"), "The fastest ways, fastest first")
    assert [row[0] for row in found] == ["all on device fastest", "cut", "send the input to edge", "cut",
                                         "send the input to cloud"]  # fmt: skip
    assert found[0][1] == "~77.64 ms"
    # device, edge and cloud as the links order them; then links, what is sent, bytes.
    assert found[1][3:] == ["28.4", "1.86", "0", "127", "depthwise_conv2d_3.tmp_0 , conv2d_469.tmp_0",
                            "2.3 MiB", "1.2 MiB", "600.0 KiB", "yes"]  # fmt: skip
    assert found[3][-1] == "no"


def test_the_fastest_that_does_not_fit_is_not_called_so(make_bundle: MakeBundle) -> None:
    about = split_about()
    for cut in about["split"]["tiers"]["cuts"]:
        cut["fits"] = cut["kind"].startswith("send the input to edge")
    page = render_html(collect(open_bundle(make_bundle({}, about))))
    named = [row[0] for row in rows(page, "The fastest ways, fastest first") if "fastest" in row[0]]
    assert named == ["send the input to edge fastest"]


def test_the_sweep_says_where_the_choice_changes(page: str) -> None:
    said = texts(section(page, "stages"))
    assert "78.1 kB/s to 5 MB/s: all on device" in said
    assert "at 20 MB/s: cut at depthwise_conv2d_3.tmp_0 , conv2d_469.tmp_0" in said
    assert "80 MB/s to 1.28 GB/s: send the input to edge" in said
    found = rows(section(page, "stages"), "The fastest way by bandwidth")
    assert [row[1] for row in found] == ["0.01562x", "0.0625x", "0.25x", "1x (as given)", "4x", "16x", "64x", "256x"]
    assert found[4][2:] == ["cut", "~65.12 ms", "28.4", "1.86", "0", "34.8",
                            "depthwise_conv2d_3.tmp_0 , conv2d_469.tmp_0", "600.0 KiB"]  # fmt: skip


def test_the_plot_stacks_tiers_and_links_on_a_logarithmic_axis(page: str) -> None:
    (plot,) = re.findall(r"<svg class=\"[^\"]*sweep.*?</svg>|<svg [^>]*sweep[^>]*>.*?</svg>", page, flags=re.DOTALL)
    bars = [
        [(float(x), float(y), float(height), kind) for x, y, height, kind in re.findall(
            r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" class="(\w+)"', group)]
        for group in re.findall(r"<g>(.*?)</g>", plot, flags=re.DOTALL)
    ]  # fmt: skip
    assert [[kind for *_, kind in bar] for bar in bars] == (
        [["tier0"]] * 4 + [["tier0", "tier1", "links"]] + [["tier1", "links"]] * 3
    )
    for bar in bars:
        for (_, y, _, _), (_, above, height, _) in itertools.pairwise(bar):
            assert above + height == pytest.approx(y, abs=0.7), "each piece stands on the one before"
    steps = [after[0][0] - before[0][0] for before, after in itertools.pairwise(bars)]
    assert max(steps) - min(steps) < 0.3, "bandwidths four times apart are equally far from each other"
    total = sum(height for _, _, height, _ in bars[4])
    assert total / bars[0][0][2] == pytest.approx(65.12 / 77.64, rel=0.02)
    assert plot.count('class="here"') == 1


def test_what_is_an_estimate_is_marked(page: str, make_bundle: MakeBundle) -> None:
    assert "none of them was measured" in texts(section(page, "stages"))
    about = split_about()
    about["split"]["tiers"]["estimate"] = False
    other = section(render_html(collect(open_bundle(make_bundle({}, about)))), "stages")
    assert "none of them was measured" not in texts(other)
    assert rows(other, "The fastest ways, fastest first")[0][1] == "77.64 ms"


def test_other_places_to_cut(make_bundle: MakeBundle) -> None:
    about = split_about()
    del about["split"]["tiers"]
    sizes = {"deep": 4096, "deeper": 512}
    about["split"]["candidates"] = [
        {"tensors": [name], "flops_before": 0.45, "bytes": {"fp32": size, "fp16": size // 2, "int8": size // 4}}
        for name, size in sizes.items()
    ] + [{"tensors": ["batch_norm_9.tmp_2"], "flops_before": 0.9, "bytes": {"fp32": 9000, "fp16": 4500, "int8": 2250}}]
    page = render_html(collect(open_bundle(make_bundle({}, about))))
    assert rows(page, "Places to cut") == [
        ["deeper", "", "45 %", "512 B", "256 B", "128 B"],
        ["deep", "", "45 %", "4.0 KiB", "2.0 KiB", "1.0 KiB"],
        ["batch_norm_9.tmp_2", "taken", "90 %", "8.8 KiB", "4.4 KiB", "2.2 KiB"],
    ]


def test_placement_tells_measured_from_estimated(page: str) -> None:
    found = {row[0]: row[1:] for row in rows(section(page, "placement"), "Where each variant runs")}
    head = found["cortex-a76 / head"]
    assert head[1] == "device"
    assert head[4:] == ["4.10 ms", "measured", "~3.20 ms", "−21.95 %", "1", "not at all", "244", "within the budget"]
    body = found["jetson-agx-orin / body"]
    assert body[4:7] == ["~0.9 ms", "estimated", "~0.9 ms"]
    assert body[8:] == ["1, 2, 4, 8", "2.60 ms", "~3.08k", "within the budget"]
    assert found["x86-64 / tail"][-1] == "above the budget"


def test_a_card_shows_the_curve_and_the_batches_to_gather(page: str) -> None:
    cards = re.findall(r"<article.*?</article>", page, flags=re.DOTALL)
    head = next(card for card in cards if "cortex-a76 / head" in card)
    assert head.count('class="dot"') == 4
    assert head.count('class="square"') == 4
    assert 'class="line measured"' in head
    assert 'class="line estimated"' in head
    assert 'class="allowed"' in head, "10 ms are among the times of the curve"
    assert rows(head, "by batch size</caption>")[2] == ["4", "14.20 ms", "~12.00 ms", "−15.49 %", "282"]
    assert "Batches for 10.00 ms within the budget" in texts(head)
    body = next(card for card in cards if "jetson-agx-orin / body" in card)
    assert 'class="dot"' not in body
    assert "Batches for 10.00 ms within the budget estimated" in texts(body)
    assert "the budget is that of the whole chain" in texts(body)
    assert 'class="allowed"' not in body, "a budget far above the curve would press it flat"


def test_no_recommendation_without_a_budget(make_bundle: MakeBundle) -> None:
    timed = latency("device", (2.0, 3.0, 5.0, 9.0), None)
    page = render_html(collect(open_bundle(make_bundle({}, {}, latency=timed))))
    assert "Latency by batch size" in page
    assert "Batches for" not in page


def test_channel_groups_stand_under_their_output(page: str) -> None:
    card = next(card for card in re.findall(r"<article.*?</article>", page, flags=re.DOTALL) if "x86-64 / tail" in card)
    names = [row[0] for row in rows(card, "Outputs of x86-64 / tail")]
    assert names == ["detections", "boxes of detections", "scores of detections", "mask"]
    assert "Outputs against FP32 (2, 2 channel groups)" in card


def test_an_unsplit_bundle_has_no_such_section(report: Report) -> None:
    page = render_html(report)
    assert section(page, "stages") == ""
    assert 'href="#stages"' not in page


# -- bundles from anywhere


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["split", "stages"], "head"),
        (["split", "stages", 0, "inputs", 0, "bytes"], -1),
        (["split", "stages", 1, "name"], None),
        (["split", "stages", 0, "seconds"], "1"),
        (["split", "transport"], [1]),
        (["split", "transport", "conv2d_469.tmp_0", "scale"], "small"),
        (["split", "chains", 0, "accuracy", "agreement"], 1.5),
        (["split", "chains", 0, "stages"], {}),
        (["split", "tiers", "links"], []),
        (["split", "tiers", "links", 0, "bandwidth"], 0),
        (["split", "tiers", "transport"], "bits"),
        (["split", "tiers", "cuts", 0, "tier_ms", "device"], 1e300),
        (["split", "tiers", "sweep", 0, "factor"], 0.0),
        (["split", "tiers", "sweep", 0, "bytes", "int8"], 2**70),
        (["split", "sizes"], {"batch": 1.5}),
        (["split", "notes"], [3]),
        (["targets", "a100", "tier"], 7),
        (["serving"], {"latency_budget_ms": True}),
        (["serving"], {"latency_budget_ms": 10**400}),
        (["split"], 3),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) and value else None,
)
def test_another_shape_is_left_out_and_told(make_bundle: MakeBundle, keys: list[Any], value: Any) -> None:
    """The part that is wrong goes; the others stay, and the page says what is missing."""
    about = split_about()
    holder: Any = about
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    report = collect(open_bundle(make_bundle({}, about)))
    (fault,) = report.left_out
    assert fault.startswith(".".join(map(str, keys[:2])))
    page = render_html(report)
    assert "Left out: parts of the bundle" in page
    assert report.to_json()["left_out"] == [fault]
    if keys[:2] != ["split", "chains"] and keys != ["split"]:
        assert "Chains of variants against FP32" in page


@pytest.mark.parametrize(
    "wrong",
    [
        {"by_batch": {"one": 2.0}},
        {"by_batch": {"9" * 5000: 2.0}},
        {"by_batch": [1, 2]},
        {"by_batch": {"1": 1e200}},
        {"by_batch": {"1": "fast"}},
        {"p50_ms": "fast", "batch": 4},
        {"p50_ms": 3.0, "batch": 10**30},
        {"estimate": {"by_batch": {"1": True}}},
        {"estimate": {"by_batch": {"1": 1.0}, "method": 3}},
        {"estimate": "soon"},
    ],
)
def test_a_latency_of_another_shape_is_left_out_and_told(make_bundle: MakeBundle, wrong: dict[str, Any]) -> None:
    report = collect(open_bundle(make_bundle({}, split_about(), latency={"evidence": "device", **wrong})))
    (fault,) = report.left_out
    assert fault.startswith("t4: latency")
    assert "Latency by batch size" not in render_html(report)


def test_extremes_can_be_drawn(make_bundle: MakeBundle) -> None:
    about = split_about()
    tiers = about["split"]["tiers"]
    tiers["sweep"] = [
        copy.deepcopy(tiers["sweep"][0]) | {"factor": factor, "total_ms": 1e15}
        for factor in (1e-300, 1e-300, 1.0, 1e12)
    ]
    tiers["sweep"][1]["tier_ms"] = dict.fromkeys(("cloud", "device", "edge"), 1e15)
    tiers["links"][0]["bandwidth"] = 1e18
    timed = {"evidence": "device", "by_batch": {"1": 5e-324, "2147483648": 1e15, "7": 0.0}}
    page = render_html(collect(open_bundle(make_bundle({}, about, latency=timed))))
    numbers = {value for _, _, value in Structure(page).attributes} | set(re.findall(r'd="([^"]*)"', page))
    assert not [value for value in numbers if re.search(r"\b(nan|inf)\b", value)]


def test_hostile_names_stay_text(make_bundle: MakeBundle) -> None:
    page = render_html(collect(open_bundle(make_bundle({}, named_split(HOSTILE), stage=HOSTILE[:120]))))
    assert page.count("<script") == page.count("<style") == 1
    assert "<img" not in page
    plain = render_html(collect(open_bundle(make_bundle({}, named_split("plain"), stage="plain"))))
    assert Structure(page).elements == Structure(plain).elements


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_anywhere_gives_a_page(split_report: Report, data: st.DataObject) -> None:
    """One value of `about` is replaced by any JSON: a page comes out, whole or with the part told as left out."""
    about = split_about()
    holder: Any = about
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        holder = inner
    holder[key] = data.draw(JSON)
    assert "</html>" in render_html(replace(split_report, about=about, facts=read_about(about)))


def test_a_large_split_stays_small(make_bundle: MakeBundle) -> None:
    """900 stages with ten tensors each, whose names are long."""
    about = split_about()
    long = "block/" * 12
    about["split"]["stages"] = []
    for at in range(900):
        inputs = [tensor(f"{long}{at}-{each}", [1, 64], 256, f"stage{at - 1}") for each in range(10)]
        about["split"]["stages"].append(stage(f"stage{at}", inputs, [], 3, 9, 9))
    page = render_html(collect(open_bundle(make_bundle({}, about))))
    assert len(page.encode()) < SIZE_LIMIT
    assert "stages not shown" in texts(section(page, "stages"))
    assert "tensors not shown" in texts(section(page, "stages"))

"""The HTML page without a browser: nothing gets in, nothing is loaded, and it says what the bundle says."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelforge.bundle.read import open_bundle
from modelforge.errors import InputError
from modelforge.report import Report, collect, render_html, write_html
from modelforge.report.page import SIZE_LIMIT, is_report
from tests.report.report_bundles import (
    ABOUT,
    Maker,
    accuracy_document,
    build_document,
    calibration_document,
    int8_bundle,
    record,
    sensitivity_document,
)

MakeBundle = Callable[..., Path]
HOSTILE = "</script></style></title><img src=x onerror=alert(1)><script>alert(2)</script>\"'` onload=alert(3) &lt;"


class Structure(HTMLParser):
    """The elements of a page with their attribute names, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(path: Path) -> str:
    return render_html(collect(open_bundle(path)))


def test_it_says_what_the_bundle_says(report: Report) -> None:
    text = " ".join(Structure(render_html(report)).text)
    for said in (
        "cortex-a76", "−0.0075", "22.4 dB", "8.24 ms", "1.75x slower than fp32", "top1 drops by 0.0210",
        "6 layers kept higher is the fewest tried", "a softmax loses most", "depthwise_conv2d_9.tmp_0",
        "above what FP16 holds", "FoldBatchNormalization", "tiled 4x16", "ziglang ld.lld", "TensorRT-RTX runtime 1.7.x",
        "no rung of the ladder", "114 %", "batch_norm_27.tmp_3", "PaddlePaddle", "x: float32 batch x 3 x 48 x 192",
    ):  # fmt: skip
        assert said in text, said
    for variant in report.variants:
        assert variant.digest in text
        assert variant.record.artifact is None or variant.record.artifact.digest in text
    assert all(digest in text for digest in (report.digest, ABOUT["model"]["digest"], ABOUT["recipe"]["digest"]))


def test_what_is_shared_is_shown_once(report: Report) -> None:
    """Three variants carry calibration files, two of them the same."""
    page = render_html(report)
    assert page.count("Activation histograms") == 2
    assert "a100, cortex-a76" in page


def test_nothing_is_loaded(report: Report) -> None:
    structure = Structure(render_html(report))
    links = [value for _, name, value in structure.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert links
    assert all(link == "data:," or link.startswith("#") for link in links)
    assert not {"img", "iframe", "object", "embed", "base", "form", "video"} & {tag for tag, _ in structure.elements}
    assert not re.search(r"@import|url\(|@font-face", render_html(report))


def test_the_policy_allows_our_style_and_script_alone(report: Report) -> None:
    page = render_html(report)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert page.index("Content-Security-Policy") < page.index("<style>")
    for tag in ("style", "script"):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not [name for _, names in Structure(page).elements for name in names if name == "style" or name[:2] == "on"]


def _named(make_bundle: MakeBundle, name: str) -> str:
    """A page on which everything that can be a free text is ``name``."""
    accuracy = accuracy_document(drop=0.01, sqnr=20.0, kept=2)
    for layer in accuracy["layers"]:
        layer |= {"op": name, "reason": name}
    accuracy["layers"][0]["node"] = accuracy["per_output"][0]["output"] = name
    accuracy |= {"reasons": [name], "metric": name, "gate": name}
    accuracy["ladder"] = [{"precision": name, "gate": name, "reason": name}]
    calibration = calibration_document(2)
    calibration["tensors"][0]["name"] = calibration["method"] = calibration["data_digest"] = name
    sensitivity = sensitivity_document() | {"metric": name}
    sensitivity["ranking"][0] |= {"node": name, "op": name}
    sensitivity["curve"][0]["gate"] = name
    build: dict[str, Any] = build_document()
    build["lower"] = {"kept": {"z" + name: name}}
    build["compile"] = {"z" + name: name, "rules": {"a": name, "b": name}, "list": [name]}
    documents = {"accuracy.json": accuracy, "calibration.json": calibration, "sensitivity.json": sensitivity}
    about = {
        "serving": {"task": "t" + name}, "model": {"digest": "d" + name, "producer": "p" + name,
        "opsets": {name: name}}, "inputs": [{"name": name, "dtype": name, "shape": [name]}], "modelforge": name,
    }  # fmt: skip
    path = make_bundle(
        {**documents, "report.json": build}, about,
        notes=[name], commands=[[name, name]], toolchain={name: name}, compiler="c" + name, runtime={"requires": name},
    )  # fmt: skip
    return page_of(path)


def test_hostile_names_stay_text(make_bundle: MakeBundle) -> None:
    page = _named(make_bundle, HOSTILE)
    assert page.count("<script") == page.count("<style") == page.count("<title>ppocr-cls 1.2.0") == 1
    assert "<img" not in page
    assert "onerror=alert(1)>" not in page
    assert Structure(page).elements == Structure(_named(make_bundle, "plain")).elements


@given(name=st.text(min_size=1, max_size=40).filter(lambda text: "\n" not in text and text.strip() == text))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_changes_the_page(make_bundle: MakeBundle, name: str) -> None:
    """Whatever a name is, the page's elements are those of a page with a plain name."""
    global _PLAIN  # noqa: PLW0603 - one page for all examples
    _PLAIN = _PLAIN or Structure(_named(make_bundle, "plain")).elements
    page = _named(make_bundle, name)
    assert Structure(page).elements == _PLAIN
    page.encode()


_PLAIN: list[tuple[str, tuple[str, ...]]] = []


def test_what_does_not_print_is_made_visible(make_bundle: MakeBundle) -> None:
    page = page_of(make_bundle({}, notes=["safe\u202egpj.exe\x00\x1b[31m"]))
    assert not {"\u202e", "\x00", "\x1b"} & set(page)
    assert r"safe\u202egpj.exe\x00\x1b[31m" in page


def test_odd_facts_about_the_bundle_are_passed_over(make_bundle: MakeBundle) -> None:
    about = {"model": 3, "recipe": [], "serving": {"latency_budget_ms": True}, "inputs": [1, {"shape": None}],
             "outputs": "x", "modelforge": {}}  # fmt: skip
    assert "bundle" in page_of(make_bundle({}, about))


def test_extreme_figures_can_be_drawn(make_bundle: MakeBundle) -> None:
    huge = 1.7e308
    accuracy = accuracy_document(drop=huge, sqnr=-huge)
    accuracy["layers"] = [{"node": "a", "op": "Conv", "sqnr_db": huge}, {"node": "b", "op": "Conv", "sqnr_db": -huge}]
    tensors = [
        {"name": "wide", "minimum": -huge, "maximum": huge, "low": -huge, "high": huge, "zeros": 2**63 - 1,
         "bins": {"low": -huge, "high": huge, "counts": [2**63 - 1] * 4096}},
        {"name": "point", "minimum": 0.0, "maximum": 0.0, "low": 0.0, "high": 0.0,
         "bins": {"low": 0.0, "high": 0.0, "counts": [0]}},
        {"name": "one", "minimum": 1.0, "maximum": 1.0, "low": 5.0, "high": 6.0,
         "bins": {"low": 1.0, "high": 1.0, "counts": [7]}},
        {"name": "bare", "minimum": -1.0, "maximum": 1.0, "low": -1.0, "high": 1.0},
    ]  # fmt: skip
    curve = [{"excluded": 10**15, "drop": -huge, "sqnr_db": 5e-324}, {"excluded": 0, "drop": huge, "sqnr_db": 5e-324}]
    page = page_of(
        make_bundle(
            {
                "accuracy.json": accuracy,
                "calibration.json": {"schema": 1, "samples": 1, "tensors": tensors},
                "sensitivity.json": {"schema": 1, "curve": curve, "ranking": [], "chosen": 7},
            },
            latency={"evidence": "device", "p50_ms": 5e-324},
        )
    )
    numbers = {value for _, _, value in Structure(page).attributes} | set(re.findall(r'd="([^"]*)"', page))
    assert not [value for value in numbers if re.search(r"\b(nan|inf)\b", value)]


def test_clipped_share_counts_what_lies_outside(make_bundle: MakeBundle) -> None:
    tensor = {"name": "y", "minimum": 0.0, "maximum": 4.0, "low": 0.0, "high": 2.0, "zeros": 5,
              "bins": {"low": 0.0, "high": 4.0, "counts": [50, 25, 20, 5]}}  # fmt: skip
    page = page_of(make_bundle({"calibration.json": {"schema": 1, "samples": 1, "tensors": [tensor]}}))
    assert "<b>25 % outside</b>" in page
    assert 'data-key="0.05">5 %</td>' in page
    assert 'class="outside"' in page


def test_it_is_the_same_for_the_same_bundle(tmp_path: Path, bundle: Path) -> None:
    """At another place, in another process with another hash seed."""
    other = int8_bundle(tmp_path / "elsewhere")
    code = (
        "import sys; from pathlib import Path; from modelforge.bundle.read import open_bundle\n"
        "from modelforge.report import collect, render_html\n"
        "sys.stdout.buffer.write(render_html(collect(open_bundle(Path(sys.argv[1])))).encode())"
    )
    pages = [
        subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for path, seed in ((bundle, "1"), (other, "2"))
    ]
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[1]


def test_a_large_bundle_stays_small(tmp_path: Path) -> None:
    """Twelve targets with 600 layers and 600 histograms each, none of them shared, with long names."""
    maker = Maker(tmp_path / "sources")
    for at in range(12):
        accuracy = accuracy_document(drop=0.002, sqnr=20.0)
        accuracy["layers"] = [
            {
                "node": f"/backbone/{'block/' * 30}{layer}",
                "op": "Conv",
                "sqnr_db": 10.0 + layer / 20,
                "precision": "int8",
            }
            for layer in range(600)
        ]
        calibration = calibration_document(600) | {"method": f"auto {at}"}
        for tensor in calibration["tensors"]:
            tensor["name"] = f"{tensor['name']}/{'block/' * 30}"
        maker.add(
            record(f"target-{at}", "int8", drop=0.002, sqnr=20.0),
            {"accuracy.json": accuracy, "calibration.json": calibration, "sensitivity.json": sensitivity_document()},
        )
    page = page_of(maker.write(tmp_path / "bundle"))
    assert 1_000_000 < len(page.encode()) < SIZE_LIMIT == 3_000_000
    assert "/block/0</code>" in page, "the worst layer is shown"
    assert "layers with a higher SQNR not shown" in page
    assert "most clipped of 600" in page


def _luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_both_colour_schemes(report: Report) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for what drawings mean."""
    style = render_html(report).partition("<style>")[2].partition("* {")[0]
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media"))
    assert light.keys() == dark.keys()
    texts = [(ink, back) for ink in ("ink", "soft", "accent") for back in ("page", "card", "head")]
    texts += [("good", "good-back"), ("bad", "bad-back"), ("warn", "warn-back"), ("ink", "plain-back")]
    drawn = [(ink, "card") for ink in ("lower", "higher", "ok", "not-ok", "limit", "third")]
    for scheme in (light, dark):
        for pairs, least in ((texts, 4.5), (drawn, 3.0)):
            for ink, back in pairs:
                bright, dim = sorted((_luminance(scheme[ink]), _luminance(scheme[back])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= least, (ink, back, scheme)


def test_writing_replaces_the_file_whole(report: Report, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("what stood there")
    assert write_html(report, file, bundle=bundle) == file.stat().st_size
    assert is_report(file)
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_failed_write_leaves_what_stood_there(
    report: Report, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    file.write_text("what stood there")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="cannot be written"):
        write_html(report, file, bundle=bundle)
    assert file.read_text() == "what stood there"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("place", ["report.html", "blobs/report.html", "link"])
def test_never_inside_the_bundle(report: Report, bundle: Path, tmp_path: Path, place: str) -> None:
    file = bundle / place
    if place == "link":
        (tmp_path / "link").symlink_to(bundle)
        file = tmp_path / "link" / "report.html"
    with pytest.raises(InputError, match="inside the bundle"):
        write_html(report, file, bundle=bundle)
    assert not file.exists()


@pytest.mark.parametrize("place", [".", "missing/report.html", "/dev/null"])
def test_where_no_file_can_be(report: Report, bundle: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError):
        write_html(report, tmp_path / place, bundle=bundle)


def test_where_else_the_model_can_run(make_bundle: MakeBundle) -> None:
    estimate = {
        "precision": "int8", "verdict": "yes", "needed_bytes": 2048, "allowed_bytes": 1 << 30, "latency_ms": 7.5,
        "limit": "compute",
    }  # fmt: skip
    row = {
        "target": "rv1106", "tier": "device", "verdict": "after quantization", "precision": "int8",
        "why": "fp16: too much memory", "estimates": [estimate],
    }  # fmt: skip
    placement = {"budget_ms": 33.3, "rows": [row]}
    page = page_of(make_bundle({}, about={**ABOUT, "placement": placement}))
    text = " ".join(Structure(page).text)
    for said in ("Where the model can run", "rv1106", "after quantization", "2.0 KiB", "too much memory"):
        assert said in text
    assert "~7.5" in text.replace("~ ", "~")
    broken = page_of(make_bundle({}, about={**ABOUT, "placement": {"budget_ms": "x", "rows": [row]}}))
    assert "placement.budget_ms" in " ".join(Structure(broken).text)

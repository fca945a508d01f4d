"""`modelforge report` as it is called, also on a bundle that was really built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from modelforge.report.about import read_about
from tests.conftest import Forge


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """The bundle in a folder of its own, where a report may be written beside it."""
    return Path(shutil.copytree(bundle, tmp_path / "dist" / "ppocr-cls-1.2.0"))


def test_the_terminal_shows_figures_ladder_and_reasons(forge: Forge, bundle: Path) -> None:
    done = forge("report", bundle)
    assert done.code == 0
    for said in (
        "cortex-a76",
        "0.0075",
        "22.4",
        "top1 drops by 0.0210",
        "kept higher",
        "a softmax loses most",
        "8.24",
        "1.75x slower",
    ):
        assert said in done.out, said
    assert not list(bundle.parent.glob("*.html"))


def test_json_is_one_document(forge: Forge, bundle: Path) -> None:
    document = forge("report", bundle, "--json").json
    assert document["name"] == "ppocr-cls"
    assert document["html"] is None
    assert {"accuracy", "calibration", "sensitivity"} == set(document["variants"][1]["reports"])


def test_the_terminal_shows_batches_chains_and_bandwidths(forge: Forge, split_path: Path) -> None:
    done = forge("report", split_path)
    assert done.code == 0
    for said in (
        "head on cortex-a76 -> body on jetson-agx-orin -> tail on a100",
        "a variant of it is missing",
        "device, reference, reference",
        "by bandwidth, estimated",
        "send the input to edge",
        "65.120",
        "1, 2, 4, 8",
        "within",
        "above",
    ):
        assert said in done.out, said
    document = forge("report", split_path, "--json").json
    assert [stage["name"] for stage in document["split"]["stages"]] == ["head", "body", "tail"]
    assert document["variants"][1]["batching"]["preferred_batch_sizes"] == [1]
    assert document["left_out"] == []


def test_the_terminal_tells_what_was_left_out(forge: Forge, make_bundle: Callable[..., Path]) -> None:
    done = forge("report", make_bundle({}, {"split": {"chains": "\x1b[2J"}}))
    assert done.code == 0
    assert "left out" in done.out
    assert "split.chains" in done.out
    assert "\x1b" not in done.out


def test_html_goes_beside_the_bundle(forge: Forge, copied: Path) -> None:
    done = forge("report", copied, "--html")
    file = copied.parent / "report.html"
    assert (done.code, done.out) == (0, f"{file}\n")
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    first = file.read_bytes()
    assert forge("report", copied, "--html", "--json").json["html"] == str(file)
    assert file.read_bytes() == first
    assert sorted(path.name for path in copied.iterdir()) == ["blobs", "index.json", "oci-layout"]


def test_a_page_of_another_make_is_left(forge: Forge, copied: Path) -> None:
    file = copied.parent / "report.html"
    file.write_text("my own report")
    done = forge("report", copied, "--html")
    assert done.code == 2
    assert "--html FILE" in done.err
    assert file.read_text() == "my own report"
    assert forge("report", copied, "--html", file).code == 0


def test_inside_the_bundle_is_refused(forge: Forge, copied: Path) -> None:
    done = forge("report", copied, "--html", copied / "report.html")
    assert done.code == 2
    assert "inside the bundle" in done.err
    assert forge("verify", copied, "--no-run").code == 0


def test_a_damaged_report_file_is_told_as_damage(forge: Forge, make_bundle: Callable[..., Path]) -> None:
    path = make_bundle({"sensitivity.json": b"{"})
    for more in ([], ["--html", forge.cwd / "out.html"]):
        done = forge("report", path, *more)
        assert done.code == 5, done.err
        assert "sensitivity.json" in done.err
    assert not (forge.cwd / "out.html").exists()
    assert forge("report", path, "--json").json["error"]["exit_code"] == 5


def test_nothing_of_the_terminal_is_at_the_names_mercy(forge: Forge, make_bundle: Callable[..., Path]) -> None:
    kept = {"report.json": {"lower": {"kept": {"\x1b]0;owned\x07node": "\x1b[2Jreason"}}}}
    done = forge("report", make_bundle(kept))
    assert "\x1b" not in done.out
    assert "\\x1b[2Jreason" in done.out


def test_no_bundle(forge: Forge, tmp_path: Path) -> None:
    done = forge("report", tmp_path)
    assert done.code == 2
    assert "is not a bundle" in done.err


def test_it_imports_nothing_heavy(forge: Forge, bundle: Path, tmp_path: Path) -> None:
    """It is in the deployer's install: no numpy, no onnx, no template engine."""
    code = (
        "import sys; from modelforge.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'onnx_ir', 'jinja2', 'modelforge.forge'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    argv = [sys.executable, "-c", code, "report", str(bundle), "--html", str(tmp_path / "out.html")]
    done = subprocess.run(argv, env=forge.env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs the build extra")
def test_what_split_plans_is_what_is_read(forge: Forge, digits: Path) -> None:
    """What the forge says of tiers and other places to cut, as the bundle carries it, has the shape drawn here."""
    model = digits / "model.onnx"
    tiers = ["--tier", "device=cortex-a76", "--tier", "cloud=a100:fp16", "--link", "device-cloud=1ms,10MB/s"]
    planned = forge("split", model, *tiers, "--plan-only", "--size", "batch=4", "--json").json
    facts = read_about({"split": planned})
    assert facts.left_out == ()
    assert facts.split is not None
    assert facts.split.tiers is not None
    assert facts.split.tiers.tiers == ("device", "cloud")
    assert len(facts.split.tiers.sweep) == len(planned["tiers"]["sweep"]) > 3
    assert facts.split.stages[0].flops == planned["stages"][0]["flops"]
    at = forge("split", model, "--stages", "2", "--plan-only", "--size", "batch=4", "--json").json
    found = read_about({"split": at})
    assert found.left_out == ()
    assert found.split is not None
    assert len(found.split.candidates) == len(at["candidates"]) > 3


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs the build extra")
def test_a_split_bundle_that_was_built(forge: Forge, digits: Path, tmp_path: Path) -> None:
    recipe = digits / "recipe.toml"
    cut = '[split]\nstages = 2\nnames = ["head", "tail"]\ntransport = "fp16"\n\n'
    recipe.write_text(recipe.read_text().replace("[[target]]", f"{cut}[[target]]", 1))
    assert forge("build", digits, "-o", tmp_path / "dist").code == 0
    (path,) = (tmp_path / "dist").iterdir()
    document = forge("report", path, "--html", "--json").json
    assert document["left_out"] == []
    assert {variant["stage"]: variant["batching"]["source"] for variant in document["variants"]} == {
        "head": "measured",
        "tail": "measured",
    }
    page = (tmp_path / "dist" / "report.html").read_text(encoding="utf-8")
    for said in ("head on x86-64", "as FP16", "Places to cut", "Latency by batch size", "estimate is off by"):
        assert said in page, said
    assert str(tmp_path) not in page


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs the build extra")
def test_a_bundle_that_was_built(forge: Forge, digits: Path, tmp_path: Path) -> None:
    assert forge("build", digits, "-o", tmp_path / "dist").code == 0
    (path,) = (tmp_path / "dist").iterdir()
    done = forge("report", path, "--html")
    assert done.code == 0, done.err
    page = (tmp_path / "dist" / "report.html").read_text(encoding="utf-8")
    for said in ("x86-64", "onnxruntime", "nodes before", "gate passed", "Provenance"):
        assert said in page, said
    assert str(tmp_path) not in page

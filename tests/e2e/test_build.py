"""The whole way on the digits recipe: build, build again, add a target, fail a gate, verify."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modelforge.compilers import get_compiler
from modelforge.target import Registry
from tests.conftest import ROOT, Forge, edit_targets

Edit = Callable[[str, str], None]
RECORD_KEYS = {
    "target", "stage", "status", "compiler", "toolchain", "precision", "ladder", "batch", "artifact", "runtime",
    "accuracy", "latency", "calibration", "commands", "notes",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """The committed recipe as it stands, built once: four targets."""
    folder = tmp_path_factory.mktemp("digits")
    forge = Forge(folder / "home", folder)
    done = forge("build", ROOT / "recipes" / "digits")
    assert done.code == 0, done.err
    assert "digits-1.0.0" in done.out
    for tag in ("t4", "a100", "cortex-a76", "x86-64"):
        assert tag in done.out
    return forge


def test_four_variants_compiled_and_measured(built: Forge) -> None:
    summary = built("inspect", "dist/digits-1.0.0", "--json").json
    assert {"schema", "name", "version", "digest", "path", "variants"} <= set(summary)
    records = {record["target"]: record for record in summary["variants"]}
    assert set(records) == {"t4", "a100", "cortex-a76", "x86-64"}
    arm = get_compiler("tvm").runner(Registry().get("cortex-a76")) or "reference"
    evidence = {
        "t4": "reference",
        "a100": "reference",
        "cortex-a76": arm,
        "x86-64": "device",
    }
    for tag, record in records.items():
        assert set(record) == RECORD_KEYS
        assert record["status"] == "compiled"
        accuracy = record["accuracy"]
        assert accuracy["evidence"] == evidence[tag]
        assert accuracy["gate"] == "passed"
        assert accuracy["samples"] == 360
        assert accuracy["reference"] >= 0.97
        assert accuracy["reference"] - accuracy["value"] <= 0.01
        assert accuracy["agreement"] >= 0.99
        assert record["batch"] == {"min": 1, "opt": 4, "max": 8}
        blob = built.cwd / "dist/digits-1.0.0/blobs/sha256" / record["artifact"]["digest"].removeprefix("sha256:")
        assert blob.stat().st_size == record["artifact"]["size"] > 1000
    for tag in ("t4", "a100"):
        assert "built without a GPU; compute-capability compatible, not run on one" in records[tag]["notes"]
        assert records[tag]["precision"] == "int8"
        assert records[tag]["calibration"]["samples"] == 128
    assert summary["serving"]["task"] == "image-classification"


def test_no_path_of_this_machine_in_the_bundle(built: Forge) -> None:
    """Engines and libraries included: nothing says where it was built."""
    needles = [
        str(built.cwd).encode(),
        str(Path.home()).encode() + b"/",
        str(ROOT).encode(),
    ]
    for blob in (built.cwd / "dist/digits-1.0.0").rglob("*"):
        if blob.is_file():
            data = blob.read_bytes()
            assert not any(needle in data for needle in needles), blob


def test_again_runs_nothing_and_gives_the_same(built: Forge) -> None:
    before = {path: path.stat().st_mtime_ns for path in (built.cwd / "dist").rglob("*")}
    done = built("build", ROOT / "recipes" / "digits")
    assert done.code == 0
    assert "0 steps run" in done.err
    assert "(unchanged)" in done.out
    assert before == {path: path.stat().st_mtime_ns for path in (built.cwd / "dist").rglob("*")}
    steps = built("plan", ROOT / "recipes" / "digits", "--json").json["steps"]
    assert all(step["cached"] for step in steps if step["certain"])
    uncertain = {step["title"] for step in steps if not step["cached"]}
    assert uncertain == {
        "lower to fp16",
        "compile t4 fp16",
        "verify t4 fp16",
        "compile a100 fp16",
        "verify a100 fp16",
        "verify x86-64 fp32",
        "compile cortex-a76 fp32",
        "verify cortex-a76 fp32",
        "estimate cortex-a76 fp32",
        "estimate t4 fp16",
        "estimate a100 fp16",
        "estimate x86-64 fp32",
    }


def test_build_json_is_what_inspect_prints(built: Forge) -> None:
    assert (
        built("build", ROOT / "recipes" / "digits", "--json").json
        == built("inspect", "dist/digits-1.0.0", "--json").json
    )


def test_one_target_added_runs_only_its_steps(built: Forge, tmp_path: Path) -> None:
    recipe = tmp_path / "digits"
    shutil.copytree(ROOT / "recipes" / "digits", recipe)
    with (recipe / "recipe.toml").open("a") as stream:
        stream.write('\n[[target]]\ntag = "x86-64-avx512"\nprecision = ["fp32"]\n')
    plan = built("plan", recipe, "--json").json
    assert [step["title"] for step in plan["steps"] if step["certain"] and not step["cached"]] == [
        "compile x86-64-avx512 fp32",
        "verify x86-64-avx512 fp32",
        "estimate x86-64-avx512 fp32",
    ]


def test_an_existing_bundle_is_not_replaced_unasked(built: Forge, tmp_path: Path) -> None:
    recipe = tmp_path / "digits"
    shutil.copytree(ROOT / "recipes" / "digits", recipe)
    edit_targets(recipe, {"x86-64": ["fp32"]})
    out = tmp_path / "dist"
    shutil.copytree(built.cwd / "dist", out)
    before = (out / "digits-1.0.0" / "index.json").read_bytes()
    done = built("build", recipe, "-o", out)
    assert done.code == 2
    assert "--force" in done.err
    assert (out / "digits-1.0.0" / "index.json").read_bytes() == before
    assert built("build", recipe, "-o", out, "--force").code == 0
    assert (out / "digits-1.0.0" / "index.json").read_bytes() != before


def test_verify_runs_the_golden_samples(built: Forge) -> None:
    done = built("verify", "dist/digits-1.0.0", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert document["integrity"] == "passed"
    outcomes = {each["target"]: each["outcome"] for each in document["golden"]}
    assert outcomes["x86-64"] == "passed"
    assert outcomes["t4"] == "not run"


def test_verify_finds_a_flipped_byte(built: Forge, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(built.cwd / "dist" / "digits-1.0.0", bundle)
    blob = max((bundle / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    done = built("verify", bundle)
    assert done.code == 5
    assert blob.name in done.err


def test_a_damaged_cache_is_told_and_mended(forge: Forge, digits: Path) -> None:
    assert forge("build", digits).code == 0
    blob = max(
        (forge.home / "blobs" / "sha256").iterdir(),
        key=lambda path: path.stat().st_size,
    )
    blob.chmod(0o644)
    blob.write_bytes(b"x" * blob.stat().st_size)
    done = forge("cache", "verify")
    assert done.code == 5
    assert blob.name in done.err
    assert forge("build", digits).code == 0
    assert forge("cache", "verify").code == 0


def test_gate_failure(forge: Forge, digits: Path, edit: Edit) -> None:
    """A gate that nobody can meet: exit 3, no bundle, and the JSON shows what each rung reached."""
    edit("max_drop = 0.01", "max_drop = 0.01\nmin_sqnr_db = 400")
    done = forge("build", digits, "--json")
    assert done.code == 3, done.err
    assert "SQNR" in done.err
    record = done.json["variants"][0]
    assert record["status"] == "failed"
    assert record["artifact"] is None
    assert record["ladder"][0]["gate"] == "failed"
    assert done.json["path"] is None
    assert not (forge.cwd / "dist").exists()


def test_the_baseline_is_checked_first(forge: Forge, digits: Path) -> None:
    """Labels shuffled: the FP32 model cannot meet them, and nothing is compiled."""
    arrays = dict(np.load(digits / "evaluation.npz"))
    np.savez(digits / "evaluation.npz", x=arrays["x"], label=(arrays["label"] + 1) % 10)
    done = forge("build", digits)
    assert done.code == 3
    assert "baseline" in done.err
    assert "compile" not in done.err


def test_user_metric_beside_the_recipe(forge: Forge, digits: Path, edit: Edit) -> None:
    (digits / "mine.py").write_text(
        "def accuracy(outputs, labels):\n    return (outputs['logits'].argmax(1) == labels).mean()\n"
    )
    edit('"top1"', '"mine:accuracy"')
    done = forge("build", digits, "--json")
    assert done.code == 0, done.err
    accuracy = done.json["variants"][0]["accuracy"]
    assert accuracy["metric"] == "mine:accuracy"
    assert accuracy["value"] >= 0.97
    edit('"mine:accuracy"', '"mine:acuracy"')
    done = forge("build", digits)
    assert done.code == 2
    assert 'did you mean "accuracy"?' in done.err


def test_optional_target_is_skipped(forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"x86-64": ["fp32"]})
    with (digits / "recipe.toml").open("a") as stream:
        stream.write('[[target]]\ntag = "ascend-310p3"\nprecision = ["fp16"]\nrequired = false\n')
    done = forge("build", digits, "--json")
    assert done.code == 0, done.err
    statuses = {record["target"]: record["status"] for record in done.json["variants"]}
    assert statuses == {"x86-64": "compiled", "ascend-310p3": "skipped"}


def test_ladder_falls_past_a_rung_that_cannot_be_had(forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"x86-64": ["fp16", "fp32"]}, 'compiler = "tvm"')
    record = forge("build", digits, "--json").json["variants"][0]
    assert record["precision"] == "fp32"
    assert [(rung["precision"], rung["gate"]) for rung in record["ladder"]] == [
        ("fp16", "none"),
        ("fp32", "passed"),
    ]
    assert "no hardware support for fp16" in record["ladder"][0]["reason"]


@pytest.mark.parametrize(
    "command",
    [
        ["targets"],
        ["targets", "t4"],
        ["doctor"],
        ["cache", "ls"],
        ["cache", "verify"],
        ["cache", "prune"],
    ],
    ids=" ".join,
)
def test_every_command_speaks_json(built: Forge, command: list[str]) -> None:
    done = built(*command, "--json")
    assert done.code == 0, done.err
    assert len(done.json) > 1
    plain = built(*command)
    assert plain.code == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(plain.out)


@pytest.mark.parametrize(
    "command",
    ["init", "plan", "build", "inspect", "verify", "targets", "doctor", "cache"],
)
def test_every_command_helps_with_an_example(forge: Forge, command: str) -> None:
    done = forge(command, "--help")
    assert done.code == 0
    assert "example:" in done.out
    assert f"modelforge {command}" in done.out


def test_init_writes_a_recipe_that_plans(forge: Forge, digits: Path) -> None:
    (digits / "recipe.toml").unlink()
    written = forge("init", digits / "model.onnx", "-o", digits / "other.toml", "--json").json
    done = forge("init", digits / "model.onnx")
    assert done.code == 0, done.err
    assert (digits / "recipe.toml").read_text() == written["recipe"]
    np.savez(digits / "evaluation.npz", x=np.load(digits / "evaluation.npz")["x"])
    done = forge("plan", digits)
    assert done.code == 0, done.err
    assert "x86-64" in done.out
    done = forge("init", digits / "model.onnx")
    assert done.code == 2
    assert "exists already" in done.err


def test_inspect_a_bare_model(forge: Forge, digits: Path) -> None:
    document = forge("inspect", digits / "model.onnx", "--dim", "batch=4", "--json").json
    single = forge("inspect", digits / "model.onnx", "--json").json
    assert document["inputs"][0]["shape"] == ["batch", 1, 8, 8]
    assert document["flops"] == 4 * single["flops"] > 0
    assert document["parameters"] > 1000
    assert {each["op"] for each in document["ops"]} >= {"Conv", "Gemm"}


def test_two_builds_at_once_share_the_work(forge: Forge, digits: Path) -> None:
    """Both end well, and no step ran twice: the second waits for the first one's lock."""
    import subprocess

    argv = forge.argv("build", digits)
    both = [
        subprocess.Popen(
            [*argv, "-o", str(forge.cwd / out)],
            env=forge.env(),
            stderr=subprocess.PIPE,
            text=True,
            cwd=forge.cwd,
        )
        for out in ("one", "two")
    ]
    for process in both:
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert (forge.cwd / "one/digits-1.0.0/index.json").read_bytes() == (
        forge.cwd / "two/digits-1.0.0/index.json"
    ).read_bytes()
    assert os.listdir(forge.home / "work") == []


def test_without_qemu_the_evidence_is_lower_and_it_is_said_how_to_raise_it(forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"cortex-a76": ["fp32"]})
    done = forge("plan", digits, "--json", PATH=str(forge.cwd))
    assert done.code == 0, done.err
    (variant,) = done.json["variants"]
    assert variant["rungs"][0]["evidence"] == "reference"
    assert "qemu-user-static" in variant["hint"]

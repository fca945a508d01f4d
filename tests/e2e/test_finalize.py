"""A deferred variant, and its end: compiled where the toolchain is, checked on golden samples, in a bundle of its own.

TVM is hidden while the bundle is built, as on a machine where it was not installed; ``finalize`` then has it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modelforge.compilers import get_compiler
from modelforge.target import Registry
from tests.conftest import ROOT, Forge, edit_targets

BUNDLE = "dist/digits-1.0.0"


def hide(folder: Path, package: str) -> dict[str, str]:
    """Environment of a machine where importlib.metadata does not find this package."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "found = m.version\n"
        "def version(name):\n"
        f"    if {package!r} in name: raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def deferred(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """Digits for the Cortex-A76, all prepared and nothing compiled; x86-64 beside it."""
    folder = tmp_path_factory.mktemp("deferred")
    forge = Forge(folder / "home", folder)
    shutil.copytree(ROOT / "recipes" / "digits", folder / "digits")
    edit_targets(folder / "digits", {"cortex-a76": ["fp16", "fp32"]}, 'compiler = "tvm"')
    with (folder / "digits" / "recipe.toml").open("a") as recipe:
        recipe.write('\n[[target]]\ntag = "x86-64"\nprecision = ["fp32"]\n')
    env = hide(folder / "hidden", "tvm")
    refused = forge("build", "digits", **env)
    assert (refused.code, "cortex-a76" in refused.err) == (4, True), refused.err
    done = forge("build", "digits", "--allow-deferred", "--json", **env)
    assert done.code == 0, done.err
    assert [record["status"] for record in done.json["variants"]] == [
        "deferred",
        "compiled",
    ]
    return forge


def test_the_bundle_holds_every_rung(deferred: Forge) -> None:
    files = deferred("inspect", BUNDLE, "--target", "cortex-a76", "--json").json["files"]
    roles = {each["file"]: each["role"] for each in files}
    assert roles["job.json"] == "job"
    assert roles["model.onnx"] == roles["fp32-model.onnx"] == "lowered-model"
    assert {"golden-inputs.npz", "golden-outputs.npz"} <= set(roles)


def test_finalize_compiles_checks_and_packages(deferred: Forge) -> None:
    before = deferred("inspect", BUNDLE, "--json").json
    done = deferred("finalize", BUNDLE, "--target", "cortex-a76", "--json")
    assert done.code == 0, done.err
    assert Path(done.json["path"]).name == "digits-1.0.0-cortex-a76"
    (record,) = done.json["variants"]
    assert (record["target"], record["status"], record["precision"]) == (
        "cortex-a76",
        "compiled",
        "fp16",
    )
    assert record["artifact"]["size"] > 1000
    accuracy = record["accuracy"]
    assert accuracy["evidence"] == (get_compiler("tvm").runner(Registry().get("cortex-a76")) or "reference")
    assert accuracy["gate"] == "passed"
    if accuracy["evidence"] == "emulator":
        assert accuracy["samples"] == 4
        assert any("golden samples; where it was built" in note for note in record["notes"])
    verified = deferred("verify", "dist/digits-1.0.0-cortex-a76", "--json").json
    assert verified["integrity"] == "passed"
    assert [each["outcome"] for each in verified["golden"]] != ["failed"]
    summary = deferred("inspect", "dist/digits-1.0.0-cortex-a76", "--json").json
    assert summary["finalized"] == {"from": before["digest"]}
    assert deferred("inspect", BUNDLE, "--json").json == before
    again = deferred("finalize", BUNDLE, "--target", "cortex-a76", "-o", "elsewhere", "--json")
    assert again.json["digest"] == done.json["digest"]


def test_finalize_without_the_toolchain(deferred: Forge, tmp_path: Path) -> None:
    done = deferred(
        "finalize",
        BUNDLE,
        "--target",
        "cortex-a76",
        "-o",
        tmp_path / "out",
        **hide(tmp_path / "h", "tvm"),
    )
    assert done.code == 4
    assert "TVM" in done.err
    assert "target cortex-a76" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tag", "code", "words"),
    [
        ("x86-64", 2, "compiled, not deferred"),
        ("cortex-a72", 2, "no variant for the target"),
    ],
)
def test_nothing_to_finalize(deferred: Forge, tag: str, code: int, words: str) -> None:
    done = deferred("finalize", BUNDLE, "--target", tag)
    assert (done.code, words in done.err) == (code, True), done.err


def test_a_damaged_bundle_is_not_compiled(deferred: Forge, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(deferred.cwd / BUNDLE, bundle)
    files = deferred("inspect", bundle, "--target", "cortex-a76", "--json").json["files"]
    digest = next(each["digest"] for each in files if each["file"] == "model.onnx")
    blob = bundle / "blobs" / "sha256" / digest.removeprefix("sha256:")
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    done = deferred("finalize", bundle, "--target", "cortex-a76", "-o", tmp_path / "out")
    assert done.code == 5
    assert not (tmp_path / "out").exists()


def test_golden_samples_that_fail_are_told(deferred: Forge, tmp_path: Path) -> None:
    """Another model under the same job: each rung compiles, and none gives the golden outputs."""
    from modelforge.bundle.layout import (
        BundleContent,
        BundleFile,
        VariantContent,
        write_bundle,
    )
    from modelforge.bundle.read import export_files, open_bundle

    bundle = open_bundle(deferred.cwd / BUNDLE)
    (variant,) = bundle.select("cortex-a76")
    files = export_files(bundle, variant, tmp_path / "files")
    wrong = tmp_path / "wrong.npz"
    import numpy as np

    with np.load(files["golden-outputs.npz"]) as golden:
        np.savez(wrong, **{name: np.roll(golden[name], 1, axis=1) for name in golden.files})
    files["golden-outputs.npz"] = wrong
    entries = [
        BundleFile(title, variant.files[title].role, variant.files[title].media_type, path)
        for title, path in files.items()
    ]
    content = BundleContent(
        bundle.name,
        bundle.version,
        bundle.about,
        [VariantContent(variant.record, entries)],
    )
    write_bundle(tmp_path / "bundle", content)
    done = deferred(
        "finalize",
        tmp_path / "bundle",
        "--target",
        "cortex-a76",
        "-o",
        tmp_path / "out",
    )
    if get_compiler("tvm").runner(Registry().get("cortex-a76")) is None:
        pytest.skip("needs qemu-aarch64: without it the artifact is not run")
    assert done.code == 3, done.err
    assert "fp16:" in done.err
    assert "fp32:" in done.err
    assert not (tmp_path / "out").exists()

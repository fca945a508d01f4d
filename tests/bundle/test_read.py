"""Reading: what was written comes back, and what was damaged or forged is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelforge.bundle import format as words
from modelforge.bundle.layout import BundleContent, write_bundle
from modelforge.bundle.read import Bundle, export_files, open_bundle, verify_integrity
from modelforge.errors import InputError, IntegrityError
from modelforge.store import digest_bytes
from tests.bundle.bundle_contents import MakeContent

Change = Callable[[Any], Any]


@pytest.fixture
def bundle(tmp_path: Path, make_content: MakeContent) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "bundle", make_content()).path)


def test_round_trip(bundle: Bundle, make_content: MakeContent, sources: Path) -> None:
    content: BundleContent = make_content()
    assert (bundle.name, bundle.version) == ("ppocr-cls", "1.2.0")
    assert bundle.about == content.about
    written = sorted((variant.record for variant in content.variants), key=lambda record: record.target)
    assert [variant.record for variant in bundle.variants] == written
    (t4,) = bundle.select("t4")
    assert {title: entry.role for title, entry in t4.files.items()} == {
        "main.engine": "artifact", "lowered.onnx": "lowered-model", "golden.npz": "golden", "build.log": "log",
    }  # fmt: skip
    assert bundle.file(t4, "main.engine").read_bytes() == (sources / "t4.engine").read_bytes()
    assert bundle.file(None, "report.html").read_bytes() == (sources / "report.html").read_bytes()
    assert set(bundle.manifests) < set(bundle.blobs)
    assert {words.blob_name(digest) for digest in bundle.blobs} == {
        path.relative_to(bundle.path).as_posix() for path in (bundle.path / "blobs").rglob("*") if path.is_file()
    }


def test_summary_is_what_inspect_prints(bundle: Bundle, make_content: MakeContent) -> None:
    summary = json.loads(json.dumps(bundle.summary(), allow_nan=False))
    assert list(summary)[:6] == ["schema", "name", "version", "digest", "path", "variants"]
    assert (summary["schema"], summary["path"], summary["digest"]) == (1, str(bundle.path), bundle.digest)
    assert summary["serving"] == make_content().about["serving"]
    assert summary["variants"] == [variant.record.to_json() for variant in bundle.variants]


def test_sound_bundle(bundle: Bundle) -> None:
    report = verify_integrity(bundle.path)
    assert (report.digest, report.unreferenced, report.strays) == (bundle.digest, (), ())
    assert (report.blobs, report.size) == (len(bundle.blobs), sum(bundle.blobs.values()))


def test_choosing(bundle: Bundle) -> None:
    assert bundle.select("t4", "main") == bundle.select("t4")
    with pytest.raises(InputError, match=r'"t40".*did you mean "t4"'):
        bundle.select("t40")
    with pytest.raises(InputError, match=r'no stage "head"'):
        bundle.select("t4", "head")
    with pytest.raises(InputError, match=r'did you mean "main\.engine"'):
        bundle.file(bundle.select("t4")[0], "main.engin")


@pytest.mark.parametrize("what", ["absent", "file", "empty folder", "image", "two", "one manifest"])
def test_what_is_no_bundle(tmp_path: Path, bundle: Bundle, what: str) -> None:
    path = bundle.path
    top = json.loads((path / "index.json").read_text())
    match what:
        case "absent":
            path = tmp_path / "nowhere"
        case "file":
            path = path / "index.json"
        case "empty folder":
            path = tmp_path / "empty"
            path.mkdir()
        case "image":
            index = _change_index(path, lambda index: index.pop("annotations"))
            assert index
        case "two":
            top["manifests"] *= 2
            (path / "index.json").write_text(json.dumps(top))
        case "one manifest":
            top["manifests"][0]["mediaType"] = words.MANIFEST_TYPE
            (path / "index.json").write_text(json.dumps(top))
    with pytest.raises(InputError) as caught:
        open_bundle(path)
    assert caught.value.exit_code == 2
    with pytest.raises(InputError):
        verify_integrity(path)


# -- damage


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_byte_anywhere_is_found(bundle: Bundle, data: st.DataObject) -> None:
    files = sorted(path for path in bundle.path.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    _overwrite(file, whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    try:
        with pytest.raises((IntegrityError, InputError)):
            verify_integrity(bundle.path)
    finally:
        _overwrite(file, whole)


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
def test_every_bit_of_the_files_without_a_digest_counts(bundle: Bundle, name: str) -> None:
    """What no digest protects is checked by meaning: every single flipped bit is found, and as damage (exit 5)."""
    file = bundle.path / name
    whole = file.read_bytes()
    passed = []
    for at in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                verify_integrity(bundle.path)
                passed.append((at, bit))
            except IntegrityError:
                pass
    assert passed == []


@pytest.mark.parametrize("how", ["missing", "short", "long", "empty", "link", "folder", "other"])
def test_damaged_blobs(tmp_path: Path, bundle: Bundle, how: str) -> None:
    blob = bundle.file(bundle.select("t4")[0], "main.engine")
    data = blob.read_bytes()
    blob.unlink()
    match how:
        case "short":
            blob.write_bytes(data[:-1])
        case "long":
            blob.write_bytes(data + b"x")
        case "empty":
            blob.touch()
        case "link":
            (tmp_path / "elsewhere").write_bytes(data)
            blob.symlink_to(tmp_path / "elsewhere")
        case "folder":
            blob.mkdir()
        case "other":
            blob.write_bytes(bytes(len(data)))
    with pytest.raises(IntegrityError, match=blob.name) as caught:
        verify_integrity(bundle.path)
    assert caught.value.exit_code == 5
    if how == "other":
        assert open_bundle(bundle.path) == bundle  # opening is cheap: it does not hash what is large
        with pytest.raises(IntegrityError, match="digest"):
            export_files(bundle, bundle.select("t4")[0], tmp_path / "files")
        assert os.listdir(tmp_path / "files") == []
    else:
        with pytest.raises(IntegrityError, match=blob.name):
            open_bundle(bundle.path)


def test_all_damage_is_listed(bundle: Bundle) -> None:
    t4, a100 = (bundle.file(bundle.select(tag)[0], "main.engine") for tag in ("t4", "a100"))
    _overwrite(t4, bytes(3000))
    _overwrite(a100, bytes(3000))
    with pytest.raises(IntegrityError) as caught:
        verify_integrity(bundle.path)
    assert t4.name in str(caught.value)
    assert a100.name in str(caught.value)


def test_what_nothing_leads_to_is_reported_and_hashed(bundle: Bundle) -> None:
    digest = digest_bytes(b"left over")
    (bundle.path / words.blob_name(digest)).write_bytes(b"left over")
    (bundle.path / "blobs" / "sha256" / ".part-x").write_bytes(b"")
    (bundle.path / "notes.txt").write_text("mine")
    report = verify_integrity(bundle.path)
    assert report.unreferenced == (digest,)
    assert set(report.strays) == {"notes.txt", "blobs/sha256/.part-x"}
    _overwrite(bundle.path / words.blob_name(digest), b"rotten ver")
    with pytest.raises(IntegrityError, match=digest[7:]):
        verify_integrity(bundle.path)


# -- forgeries: every digest is right, and what is said is wrong


def _overwrite(file: Path, data: bytes) -> None:
    file.chmod(0o644)
    file.write_bytes(data)


def _put(path: Path, value: Any) -> dict[str, Any]:
    data = value if isinstance(value, bytes) else words.go_json(value)
    digest = digest_bytes(data)
    if not (path / words.blob_name(digest)).exists():
        (path / words.blob_name(digest)).write_bytes(data)
    return {"digest": digest, "size": len(data)}


def _load(path: Path, entry: dict[str, Any]) -> Any:
    return json.loads((path / words.blob_name(entry["digest"])).read_bytes())


def _change_index(path: Path, change: Change) -> dict[str, Any]:
    top = json.loads((path / "index.json").read_text())
    index = _load(path, top["manifests"][0])
    change(index)
    top["manifests"][0] |= _put(path, index)
    (path / "index.json").write_bytes(words.go_json(top))
    return top


def _change_manifest(path: Path, change: Change, which: int = 0) -> None:
    def in_index(index: Any) -> None:
        manifest = _load(path, index["manifests"][which])
        change(manifest)
        index["manifests"][which] |= _put(path, manifest)

    _change_index(path, in_index)


def _change_config(path: Path, change: Change, which: int = 0) -> None:
    def in_manifest(manifest: Any) -> None:
        config = _load(path, manifest["config"])
        manifest["config"] |= _put(path, change(config) or config)

    _change_manifest(path, in_manifest, which)


def _retitle(title: str, layer: int = 0) -> Change:
    return lambda manifest: manifest["layers"][layer]["annotations"].update({words.TITLE: title})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: _change_manifest(p, _retitle("../../escape")), "file title"),
        (lambda p: _change_manifest(p, _retitle("/etc/passwd")), "file title"),
        (lambda p: _change_manifest(p, _retitle("a\\b")), "file title"),
        (lambda p: _change_manifest(p, _retitle("a\0b")), "file title"),
        (lambda p: _change_manifest(p, _retitle("..")), "file title"),
        (lambda p: _change_manifest(p, _retitle("main.engine", 1)), "twice the title"),
        (lambda p: _change_manifest(p, _retitle("MAIN.engine", 1)), "one file"),
        (lambda p: _change_manifest(p, _retitle("other.engine")), "is not in its manifest"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][0].pop("annotations")), "without a title"),
        (lambda p: _change_manifest(p, lambda m: m["layers"].pop(0)), "is not in its manifest"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][0].update(size=1)), "is not in its manifest"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][1].update(size=1)), "two sizes"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][1].update(digest="sha256:" + "0" * 64)), "missing"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][1].update(size=-1)), "size"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][1].update(size=True)), "size"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][1].update(digest="sha256:../../../etc/passwd")), "digest"),
        (lambda p: _change_manifest(p, lambda m: m["layers"][1].update(digest="sha512:" + "0" * 128)), "digest"),
        (lambda p: _change_manifest(p, lambda m: m.update(layers={})), "not a list"),
        (lambda p: _change_manifest(p, lambda m: m.update(config=[])), "not an object"),
        (lambda p: _change_manifest(p, lambda m: m["config"].update(size=5 << 20)), "at most"),
        (lambda p: _change_config(p, lambda c: c.update(target="t5")), "labels a variant"),
        (lambda p: _change_config(p, lambda c: c.update(status="failed")), "variant record"),
        (lambda p: _change_config(p, lambda c: [1]), "variant record"),
        (lambda p: _change_config(p, lambda c: b"\xff{"), "variant record"),
        (lambda p: _change_config(p, lambda c: c.update(version="9.9.9"), -1), "disagree"),
        (lambda p: _change_config(p, lambda c: b"[" * 100_000, -1), "is not JSON"),
        (lambda p: _change_index(p, lambda i: i["manifests"].pop()), "0 times what the bundle is about"),
        (lambda p: _change_index(p, lambda i: i["manifests"].append(i["manifests"][-1])), "2 times"),
        (lambda p: _change_index(p, lambda i: i["manifests"][0].update(mediaType="text/html")), "unknown"),
        (lambda p: _change_index(p, lambda i: i["annotations"].update({words.NAME: "../x"})), "no bundle and version"),
        (lambda p: _change_index(p, lambda i: i["annotations"].update({words.VERSION: "2.0.0"})), "labels the bundle"),
        (lambda p: _change_index(p, lambda i: i.update(padding="x" * (5 << 20))), "at most"),
        (lambda p: (p / "index.json").write_text("{"), "is not JSON"),
        (lambda p: (p / "index.json").unlink(), "cannot be read"),
        (lambda p: (p / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}'), "oci-layout"),
    ],
)
def test_forgeries(bundle: Bundle, change: Callable[[Path], Any], said: str) -> None:
    change(bundle.path)
    for reading in (open_bundle, verify_integrity):
        with pytest.raises(IntegrityError, match=said):
            reading(bundle.path)


def test_pipes_do_not_block(bundle: Bundle) -> None:
    (bundle.path / "index.json").unlink()
    os.mkfifo(bundle.path / "index.json")
    with pytest.raises(IntegrityError, match="is not a file"):
        open_bundle(bundle.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: _change_index(p, lambda i: i["annotations"].update({words.SCHEMA_KEY: "2"})),
        lambda p: _change_manifest(
            p, lambda m: m["config"].update(mediaType="application/vnd.modelforge.variant.v2+json")
        ),
    ],
)
def test_later_format(bundle: Bundle, change: Callable[[Path], Any]) -> None:
    change(bundle.path)
    with pytest.raises(InputError, match="later ModelForge") as caught:
        open_bundle(bundle.path)
    assert "upgrade" in str(caught.value)


def test_later_keys_are_no_obstacle(bundle: Bundle) -> None:
    def later(index: Any) -> None:
        index["annotations"]["io.modelforge.novelty"] = "1"

    _change_config(bundle.path, lambda config: config.update(novelty=1))
    _change_index(bundle.path, later)
    assert open_bundle(bundle.path).summary()["variants"] == bundle.summary()["variants"]


# -- taking files out


def test_export(tmp_path: Path, bundle: Bundle, sources: Path) -> None:
    folder = tmp_path / "deploy" / "t4"
    folder.mkdir(parents=True)
    (folder / "main.engine").write_text("an older one")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (folder / "lowered.onnx").symlink_to(precious)
    paths = export_files(bundle, bundle.select("t4")[0], folder)
    assert {title: path.name for title, path in paths.items()} == {title: title for title in paths}
    assert sorted(os.listdir(folder)) == ["build.log", "golden.npz", "lowered.onnx", "main.engine"]
    assert paths["main.engine"].read_bytes() == (sources / "t4.engine").read_bytes()
    # onnx refuses external data that is a link of either kind, and no link is written through.
    assert all(not path.is_symlink() and path.stat().st_nlink == 1 for path in paths.values())
    assert precious.read_text() == "precious"


def test_export_of_some_roles(tmp_path: Path, bundle: Bundle) -> None:
    assert list(export_files(bundle, bundle.select("t4")[0], tmp_path / "x", roles={"artifact"})) == ["main.engine"]
    assert list(export_files(bundle, None, tmp_path / "y")) == ["report.html"]


def test_export_onto_a_folder_changes_nothing(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "x" / "main.engine").mkdir(parents=True)
    with pytest.raises(InputError, match="a folder stands"):
        export_files(bundle, bundle.select("t4")[0], tmp_path / "x")
    assert os.listdir(tmp_path / "x") == ["main.engine"]


def test_export_of_a_blob_that_went_missing(tmp_path: Path, bundle: Bundle) -> None:
    shutil.rmtree(bundle.path / "blobs")
    with pytest.raises(IntegrityError, match="missing"):
        export_files(bundle, bundle.select("t4")[0], tmp_path / "x")

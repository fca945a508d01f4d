"""Writing: deterministic, whole or not at all, never over what is not ours."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelforge.bundle import parts
from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.read import open_bundle, verify_integrity
from modelforge.errors import BuildError, InputError, IntegrityError
from tests.bundle.bundle_contents import MakeContent, compiled_record


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_an_oci_layout(tmp_path: Path, make_content: MakeContent) -> None:
    written = write_bundle(tmp_path / "out" / "ppocr-cls-1.2.0", make_content())
    files = tree(written.path)
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["digest"] == written.digest
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "1.2.0"
    index = json.loads(files[f"blobs/sha256/{written.digest[7:]}"])
    assert "artifactType" not in index
    labels = [manifest["annotations"] for manifest in index["manifests"]]
    assert [label.get("io.modelforge.target") for label in labels] == ["a100", "jetson-agx-orin", "rk3588", "t4", None]
    assert labels[0] == {
        "io.modelforge.compiler": "tensorrt-rtx",
        "io.modelforge.kind": "variant",
        "io.modelforge.precision": "int8",
        "io.modelforge.stage": "main",
        "io.modelforge.status": "compiled",
        "io.modelforge.target": "a100",
    }
    for entry in index["manifests"]:
        assert not {"artifactType", "platform"} & set(entry)
        manifest = json.loads(files[f"blobs/sha256/{entry['digest'][7:]}"])
        assert manifest["layers"]
        assert manifest["artifactType"] == manifest["config"]["mediaType"]
    first = json.loads(files[f"blobs/sha256/{index['manifests'][0]['digest'][7:]}"])
    assert [layer["annotations"]["io.modelforge.role"] for layer in first["layers"]] == [
        "artifact", "lowered-model", "golden", "log",
    ]  # fmt: skip
    # Two engines, and what the variants share once: 5 manifests, 5 configs, 1 index, 6 files, 1 empty layer.
    assert len(files) == 2 + 5 + 5 + 1 + 6 + 1


def test_same_content_same_bytes(tmp_path: Path, make_content: MakeContent) -> None:
    content = make_content()
    shuffled = BundleContent(
        content.name,
        content.version,
        dict(reversed(content.about.items())),
        [VariantContent(variant.record, variant.files[::-1]) for variant in reversed(content.variants)],
        content.files,
    )
    undigested = make_content(digests=False)
    first = write_bundle(tmp_path / "a" / "x", content)
    second = write_bundle(tmp_path / "b" / "y", shuffled)
    third = write_bundle(tmp_path / "z", undigested)
    assert first.digest == second.digest == third.digest
    assert tree(first.path) == tree(second.path) == tree(third.path)
    assert write_bundle(tmp_path / "v", make_content(version="1.2.1")).digest != first.digest


def test_nothing_of_the_build_machine_is_inside(tmp_path: Path, make_content: MakeContent, sources: Path) -> None:
    written = write_bundle(tmp_path / "out", make_content())
    assert not any(str(sources).encode() in data for data in tree(written.path).values())


def test_unchanged_bundle_is_not_touched_and_nothing_is_read(
    tmp_path: Path, make_content: MakeContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_content()
    written = write_bundle(tmp_path / "out", content)
    before = {path: path.stat().st_mtime_ns for path in written.path.rglob("*")} | {
        tmp_path: tmp_path.stat().st_mtime_ns
    }

    def no_reading(*_: object, **__: object) -> None:
        raise AssertionError("a file was copied")

    monkeypatch.setattr(parts, "copy_file", no_reading)
    monkeypatch.setattr("modelforge.bundle.layout.digest_file", no_reading)
    again = write_bundle(tmp_path / "out", content)
    assert (again.digest, again.unchanged, written.unchanged) == (written.digest, True, False)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("damage", ["missing", "short", "index"])
def test_same_bundle_that_lost_a_blob_is_mended(tmp_path: Path, make_content: MakeContent, damage: str) -> None:
    written = write_bundle(tmp_path / "out", make_content())
    name = written.digest[7:] if damage == "index" else max(os.listdir(written.path / "blobs" / "sha256"))
    blob = written.path / "blobs" / "sha256" / name
    data = blob.read_bytes()
    blob.unlink()
    if damage == "short":
        blob.write_bytes(data[:-1])
    assert not write_bundle(tmp_path / "out", make_content()).unchanged
    assert verify_integrity(tmp_path / "out").digest == written.digest


def test_other_bundle_is_replaced_only_by_force(tmp_path: Path, make_content: MakeContent) -> None:
    destination = tmp_path / "dist" / "out"
    old = write_bundle(destination, make_content())
    with pytest.raises(InputError, match="--force") as caught:
        write_bundle(destination, make_content(version="2.0.0"))
    assert old.digest in str(caught.value)
    assert open_bundle(destination).digest == old.digest
    new = write_bundle(destination, make_content(version="2.0.0"), force=True)
    assert new.digest in str(caught.value)
    assert verify_integrity(destination).digest == new.digest != old.digest
    assert os.listdir(destination.parent) == ["out"]


@pytest.mark.parametrize("what", ["file", "folder", "empty", "link", "dangling", "foreign"])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, make_content: MakeContent, what: str, force: bool) -> None:
    destination = tmp_path / "dist" / "out"
    destination.parent.mkdir()
    other = write_bundle(tmp_path / "other", make_content(version="9.0.0")).path
    match what:
        case "file":
            destination.write_text("precious")
        case "folder":
            destination.mkdir()
            (destination / "thesis.tex").write_text("precious")
        case "empty":
            destination.mkdir()
        case "link":
            destination.symlink_to(other)
        case "dangling":
            destination.symlink_to("nowhere")
        case "foreign":
            # An image of someone else: an OCI layout, with an index of its own.
            other.rename(destination)
            top = json.loads((destination / "index.json").read_text())
            del top["manifests"][0]["annotations"]
            index = b'{"schemaVersion":2,"manifests":[]}'
            top["manifests"][0] |= {"digest": f"sha256:{'0' * 64}", "size": len(index)}
            (destination / "index.json").write_text(json.dumps(top))
            (destination / "blobs" / "sha256" / ("0" * 64)).write_bytes(index)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="not replaced"):
        write_bundle(destination, make_content(), force=force)
    assert tree(tmp_path) == before
    assert os.path.lexists(destination)


def test_files_laid_into_a_bundle_are_not_deleted_with_it(tmp_path: Path, make_content: MakeContent) -> None:
    destination = write_bundle(tmp_path / "out", make_content()).path
    (destination / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"notes\.txt"):
        write_bundle(destination, make_content(version="2.0.0"), force=True)
    assert (destination / "notes.txt").read_text() == "precious"
    assert write_bundle(destination, make_content()).unchanged


def test_file_that_is_not_what_its_digest_says(tmp_path: Path, make_content: MakeContent, sources: Path) -> None:
    content = make_content()
    (sources / "model.onnx").write_bytes(bytes(3000))
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        write_bundle(tmp_path / "dist" / "out", content)
    (sources / "model.onnx").write_bytes(bytes(2999))
    with pytest.raises(IntegrityError, match="2999 bytes"):
        write_bundle(tmp_path / "dist" / "out", content)
    assert os.listdir(tmp_path / "dist") == []


def _with_file(content: BundleContent, **changes: Any) -> BundleContent:
    first, *rest = content.variants
    file, *files = first.files
    return dataclasses.replace(
        content, variants=[VariantContent(first.record, [dataclasses.replace(file, **changes), *files]), *rest]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: dataclasses.replace(c, name="Pp ocr"), "cannot name"),
        (lambda c: dataclasses.replace(c, version="1.2.0+b5"), "cannot be a version"),
        (lambda c: dataclasses.replace(c, about={"digest": 1}), "own keys"),
        (lambda c: dataclasses.replace(c, about={"x": float("nan")}), "finite"),
        (lambda c: dataclasses.replace(c, about={"x": Path("x")}), "JSON"),
        (lambda c: dataclasses.replace(c, about={"x": "y" * (5 << 20)}), "bytes"),
        (lambda c: dataclasses.replace(c, variants=[*c.variants, c.variants[0]]), "two variants"),
        (lambda c: dataclasses.replace(c, variants=[VariantContent(c.variants[0].record, [])]), "artifact"),
        (lambda c: _with_file(c, name="../x"), "holds /"),
        (lambda c: _with_file(c, name="MAIN.engine"), "one file"),
        (lambda c: _with_file(c, role="weights"), "no role"),
        (lambda c: _with_file(c, role="artifact"), "artifact"),
        (lambda c: _with_file(c, digest="md5:1"), "sha256"),
        (lambda c: _with_file(c, path=Path("missing")), "cannot be read"),
        (lambda c: _with_file(c, path=Path("/dev/zero")), "not a file"),
    ],
)
def test_content_that_cannot_be_a_bundle(tmp_path: Path, make_content: MakeContent, change: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        write_bundle(tmp_path / "dist" / "out", change(make_content()))
    assert not (tmp_path / "dist").exists()


# -- kills, full disks, other builds

KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from modelforge.bundle import layout
calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.fsync, os.rename = counted(os.fsync), counted(os.rename)
content = pickle.loads(Path(sys.argv[1]).read_bytes())
layout.write_bundle(Path(sys.argv[2]), content, force=True)
print(calls)
"""


def _killed_at(
    step: int, content: BundleContent, destination: Path, tmp_path: Path
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "content.pickle").write_bytes(pickle.dumps(content))
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "content.pickle"), str(destination), str(step)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_kill_at_any_point_leaves_the_old_or_the_new_and_is_cleaned_up(
    tmp_path: Path, make_content: MakeContent
) -> None:
    old, new = make_content(version="1.0.0"), make_content(version="2.0.0")
    scratch = write_bundle(tmp_path / "scratch" / "out", old).path
    done = _killed_at(0, new, scratch, tmp_path)
    steps = int(done.stdout)
    assert steps > 20  # every blob, folder and rename
    interesting = [1, 2, steps // 2, *range(steps - 4, steps + 1)]
    for step in interesting:
        destination = tmp_path / f"dist{step}" / "out"
        old_digest = write_bundle(destination, old).digest
        assert _killed_at(step, new, destination, tmp_path).returncode == -9
        left = set(os.listdir(destination.parent)) - {"out"}
        assert left
        assert all(name.startswith(".part-") for name in left)
        if destination.exists():
            assert verify_integrity(destination).digest  # whole, whichever it is
        # The next write in this folder, of another bundle, brings back what was aside and removes what was left.
        write_bundle(destination.parent / "next", old)
        assert sorted(os.listdir(destination.parent)) == ["next", "out"]
        digest = verify_integrity(destination).digest
        assert digest == old_digest or step == steps


def test_kill_of_a_first_write_leaves_nothing_at_the_destination(tmp_path: Path, make_content: MakeContent) -> None:
    destination = tmp_path / "dist" / "out"
    assert _killed_at(5, make_content(), destination, tmp_path).returncode == -9
    assert not destination.exists()
    assert write_bundle(destination, make_content()).digest
    assert os.listdir(destination.parent) == ["out"]


def test_sweeping_spares_living_builds_and_what_is_not_ours(tmp_path: Path, make_content: MakeContent) -> None:
    living, dead = (tmp_path / f".part-bundle-{letter * 16}" for letter in "ab")
    foreign = [tmp_path / ".part-of-my-thesis", tmp_path / ".part-bundle-mine"]
    for folder in (living, dead, *foreign):
        folder.mkdir()
    (tmp_path / f".part-bundle-{'c' * 16}").write_text("a file")
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        write_bundle(tmp_path / "out", make_content())
    finally:
        os.close(handle)
    assert living.exists()
    assert all(folder.exists() for folder in foreign)
    assert not dead.exists()


def test_builds_at_once_make_one_bundle(tmp_path: Path, make_content: MakeContent) -> None:
    (tmp_path / "content.pickle").write_bytes(pickle.dumps(make_content()))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "content.pickle"), str(tmp_path / "dist" / "out"), "0"]
    builds = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(build.communicate()[1], build.returncode) for build in builds] == [(b"", 0)] * 4
    assert os.listdir(tmp_path / "dist") == ["out"]
    verify_integrity(tmp_path / "dist" / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path, make_content: MakeContent, sources: Path) -> None:
    big = sources / "big.bin"
    big.write_bytes(os.urandom(200_000))
    content = make_content()
    content = dataclasses.replace(content, files=[BundleFile("big.bin", "report", "application/octet-stream", big)])
    with pytest.raises(BuildError, match="no space left"):
        write_bundle(small_disk / "out", content)
    assert os.listdir(small_disk) == []


def test_disk_that_fills_while_replacing_keeps_the_old(
    tmp_path: Path, make_content: MakeContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A double for the disk: the real one above cannot be made to fill at a given call."""
    old = write_bundle(tmp_path / "dist" / "out", make_content())
    real, calls = os.rename, []

    def full(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:  # the old bundle is aside
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(BuildError, match="no space left"):
        write_bundle(tmp_path / "dist" / "out", make_content(version="2.0.0"), force=True)
    assert len(calls) == 3
    assert verify_integrity(tmp_path / "dist" / "out").digest == old.digest
    assert os.listdir(tmp_path / "dist") == ["out"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write to, root neither where it can be mounted so."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"root may write everywhere, and cannot mount here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("inside", ["out", "deeper/out"])
def test_read_only_folder(read_only: Path, make_content: MakeContent, inside: str) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_bundle(read_only / inside, make_content())


def test_output_folder_that_is_a_file(tmp_path: Path, make_content: MakeContent) -> None:
    (tmp_path / "dist").write_text("x")
    with pytest.raises(InputError, match="dist"):
        write_bundle(tmp_path / "dist" / "out", make_content())


def test_file_systems_without_locks_are_written_to_and_not_swept(
    tmp_path: Path, make_content: MakeContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / f".part-bundle-{'b' * 16}"
    dead.mkdir()

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_bundle(tmp_path / "out", make_content())
    assert dead.exists()
    assert verify_integrity(tmp_path / "out").strays == ()


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    """A sparse file of 200 MiB in a process that may have 120 MiB more than it starts with."""
    big = tmp_path / "big.engine"
    with big.open("wb") as stream:
        stream.truncate(200 << 20)
    script = """
import resource, sys
from pathlib import Path
from modelforge.bundle.layout import *
from tests.bundle.bundle_contents import compiled_record
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (120 << 20),) * 2)
path = Path(sys.argv[1])
file = BundleFile("main.engine", "artifact", "application/octet-stream", path)
variant = VariantContent(compiled_record("t4", path), [file])
write_bundle(path.parent / "out", BundleContent("x", "1.0.0", {}, [variant]))
"""
    subprocess.run([sys.executable, "-c", script, str(big)], check=True, cwd=Path(__file__).parents[2])
    assert compiled_record("t4", big).artifact == open_bundle(tmp_path / "out").variants[0].record.artifact

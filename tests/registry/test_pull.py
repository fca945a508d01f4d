"""Pulling: many at once into one store, a prune in between, a full disk; choosing, and replacing what stands there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelforge.bundle.device import this_device
from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.read import Bundle, open_bundle
from modelforge.bundle.record import Runtime, VariantRecord
from modelforge.errors import BuildError, InputError, ModelForgeError
from modelforge.registry.cache import Cache
from modelforge.registry.session import Connection
from modelforge.store import Blob, Store, digest_file
from tests.bundle.bundle_contents import compiled_record
from tests.conftest import Forge
from tests.registry.conftest import QUICK, MakeBundle
from tests.registry.hostile import Handler, Stub, serving
from tests.registry.pulling import pull_from, push_to, tree
from tests.registry.servers import Registry, needs_registry

CONNECTION = Connection(limits=QUICK)


@pytest.fixture
def stub(bundle: Bundle) -> Iterator[Stub]:
    with serving(Stub()) as stub:
        stub.take(bundle)
        yield stub


# -- many at once


@pytest.mark.registry
@needs_registry[1]
def test_eight_processes_at_once_are_one_download(
    tmp_path: Path, forge: Forge, make_bundle: MakeBundle, open_registry: Registry, repository: str
) -> None:
    bundle = make_bundle(size=20_000_000, targets=("t4",))
    push_to(bundle, repository, store=Store(tmp_path / "another-home"))
    begin = open_registry.blob_bytes()
    running = [
        subprocess.Popen(
            forge.argv("pull", f"{repository}:1.2.0", "--target", "t4", "-o", f"out{number}"),
            cwd=tmp_path, env=forge.env(), stderr=subprocess.PIPE,
        )
        for number in range(8)
    ]  # fmt: skip
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    fetched = open_registry.blob_bytes() - begin
    assert 30_000_000 <= fetched < 30_000_000 + 8 * 2 * 2048, "one download of the files, eight of two small records"
    for number in range(8):
        assert open_bundle(tmp_path / f"out{number}").select("t4") == bundle.select("t4")
    assert not list((tmp_path / "home" / "ingest").iterdir())


def test_threads_that_want_one_blob(stub: Stub, bundle: Bundle, store: Store, tmp_path: Path) -> None:
    """The first waits in the middle of its download until the others stand in line."""
    waiting = threading.Barrier(2)
    engine = bundle.select("t4")[0].files["main.engine"].digest

    def hold(handler: Handler, kind: str, name: str) -> bool:
        if name == engine:
            waiting.wait(60)
        return False

    stub.misbehave = hold
    slow = Connection()

    def one(number: int) -> int:
        return pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / f"out{number}", slow, store=store).fetched

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(one, number) for number in range(4)]
        waiting.wait(60)
        assert sum(future.result() for future in futures) == 300_000
    assert sum(engine in seen[1] for seen in stub.seen) == 1


@pytest.mark.parametrize("moment", ["while a blob comes", "between blobs"])
def test_a_prune_during_a_pull_takes_nothing_from_it(
    tmp_path: Path, stub: Stub, bundle: Bundle, store: Store, moment: str
) -> None:
    """Without any grace: as rough as can be."""
    cache = Cache(store)
    pruned = []

    def misbehave(handler: Handler, kind: str, name: str) -> bool:
        if kind == "blobs":
            if moment == "while a blob comes":
                data = stub.blobs[name]
                handler.begin(200, {"Content-Length": str(len(data))})
                handler.wfile.write(data[: len(data) // 2])
                pruned.append(cache.prune(days=0, grace=0))
                handler.wfile.write(data[len(data) // 2 :])
                return True
            pruned.append(cache.prune(days=0, grace=0))
            store.prune(0)
        return False

    stub.misbehave = misbehave
    for output in ("a", "b"):
        pulled = pull_from(f"{stub.host}/a/b:1.2.0", None, tmp_path / output, Connection(), store=store, jobs=1)
        assert pulled.digest == bundle.digest
        assert tree(tmp_path / output) == tree(bundle.path)
    assert len(pruned) > 5


def test_a_prune_keeps_what_is_in_use_and_what_is_young(tmp_path: Path, stub: Stub, store: Store) -> None:
    pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION, store=store)
    (store.home / "ingest" / ("0" * 64 + ".part")).write_bytes(b"left by a kill")
    cache = Cache(store)
    assert cache.prune(days=0).blobs == 0  # the grace of a day
    assert cache.prune(days=30, grace=0).blobs == 0  # wanted within 30 days
    assert not list((store.home / "ingest").iterdir())
    removed = cache.prune(days=0, grace=0)
    assert (removed.steps, removed.blobs, removed.freed) == (1, 2, 300_000)


def test_a_prune_leaves_builds_alone(tmp_path: Path, store: Store) -> None:
    from modelforge.store import StepRecord

    (tmp_path / "file").write_bytes(b"of a build")
    store.write(StepRecord("a" * 64, "compile", 1.0, {}, {"file": store.add(tmp_path / "file")}))
    assert Cache(store).prune(days=0, grace=0).blobs == 0
    assert store.read("a" * 64) is not None


def test_a_damaged_blob_in_the_store_is_fetched_again(tmp_path: Path, stub: Stub, bundle: Bundle, store: Store) -> None:
    """Bit rot of the same size: found because what is copied is hashed."""
    pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "a", CONNECTION, store=store)
    engine = bundle.select("t4")[0].files["main.engine"]
    path = store.blob_path(engine.digest)
    path.chmod(0o644)
    path.write_bytes(bytes(engine.size))
    again = pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "b", CONNECTION, store=store)
    assert again.fetched == engine.size
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert store.verify() == []


def test_bring_gives_every_target_a_file_of_its_own(tmp_path: Path, store: Store, bundle: Bundle) -> None:
    entry = bundle.select("t4")[0].files["main.engine"]
    data = bundle.file(bundle.select("t4")[0], "main.engine").read_bytes()
    targets = [tmp_path / name for name in "abc"]
    cache = Cache(store)
    assert cache.bring(Blob(entry.digest, entry.size), targets, lambda incoming: incoming.write(data))
    assert not cache.bring(Blob(entry.digest, entry.size), [tmp_path / "d"], lambda _: pytest.fail("it is there"))
    files = [store.blob_path(entry.digest), *targets, tmp_path / "d"]
    assert {file.read_bytes() for file in files} == {data}
    assert len({file.stat().st_ino for file in files}) == 5


# -- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Four megabytes."""
    mount = tmp_path / "small"
    mount.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(argv, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("checked_before", [True, False])
@pytest.mark.parametrize("full", ["store", "output", "both"])
def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, make_bundle: MakeBundle, small_disk: Path, monkeypatch: pytest.MonkeyPatch, full: str,
    checked_before: bool,
) -> None:  # fmt: skip
    """Also where the free space was not known before (a quota): then the write itself finds out."""
    bundle = make_bundle(size=4_000_000, targets=("t4",))
    home = small_disk / "home" if full in ("store", "both") else tmp_path / "home"
    output = small_disk / "out" if full in ("output", "both") else tmp_path / "out"
    if not checked_before:
        monkeypatch.setattr("modelforge.registry.pull._check_space", lambda *_: None)
    with pytest.raises(BuildError, match="no space"):
        pull_from(f"oci:{bundle.path}", "t4", output, store=Store(home))
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".part")]
    left = [path for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size]
    # Of the two files one may have fitted: it is whole, and stays in the store.
    assert all(digest_file(path).digest == f"sha256:{path.name}" for path in left), left


# -- choosing


def test_stages_of_a_split_model(tmp_path: Path) -> None:
    (tmp_path / "main.engine").write_bytes(b"engine")
    file = BundleFile("main.engine", "artifact", "application/octet-stream", tmp_path / "main.engine")
    record = compiled_record("t4", tmp_path / "main.engine")
    variants = [VariantContent(record.model_copy(update={"stage": stage}), [file]) for stage in ("head", "backbone")]
    bundle = open_bundle(write_bundle(tmp_path / "b", BundleContent("m", "1", {}, variants)).path)
    both = pull_from(f"oci:{bundle.path}", "t4", tmp_path / "both")
    assert len(both.variants) == 2
    assert (tmp_path / "both" / "t4" / "head" / "main.engine").read_bytes() == b"engine"
    assert {variant.record.stage for variant in open_bundle(tmp_path / "both").variants} == {"head", "backbone"}
    pull_from(f"oci:{bundle.path}", "t4", tmp_path / "one", stage="head")
    assert [path.name for path in (tmp_path / "one" / "t4").iterdir()] == ["head"]
    with pytest.raises(InputError, match=r'no stage "tail".*head.*|no stage "tail".*backbone'):
        pull_from(f"oci:{bundle.path}", "t4", tmp_path / "none", stage="tail")


def test_several_and_none_are_listed(tmp_path: Path) -> None:
    (tmp_path / "main.engine").write_bytes(b"engine")
    file = BundleFile("main.engine", "artifact", "application/octet-stream", tmp_path / "main.engine")
    record = compiled_record("t4", tmp_path / "main.engine")
    small = record.model_copy(update={"batch": record.batch.model_copy(update={"max": 4})}) if record.batch else record
    skipped = VariantRecord(target="rk3588", status="skipped", compiler=None, precision=None)
    content = [VariantContent(record, [file]), VariantContent(small, [file]), VariantContent(skipped)]
    bundle = open_bundle(write_bundle(tmp_path / "b", BundleContent("m", "1", {}, content)).path)
    digests = [variant.digest for variant in bundle.select("t4")]
    with pytest.raises(InputError) as caught:
        pull_from(f"oci:{bundle.path}", "t4", tmp_path / "out")
    assert all(digest in str(caught.value) for digest in digests)
    assert pull_from(f"oci:{bundle.path}", digests[1], tmp_path / "out").variants[0].digest == digests[1]
    for target, said in (("t5", r"there are: rk3588.*t4"), ("rk3588", "nothing to run"), ((), "which target")):
        with pytest.raises(InputError, match=said):
            pull_from(f"oci:{bundle.path}", target, tmp_path / "none")


def test_the_only_target_needs_no_name(tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(targets=("t4",), size=1000)
    assert pull_from(f"oci:{bundle.path}", (), tmp_path / "out").variants[0].digest == bundle.variants[0].digest


def test_what_cannot_run_here_is_refused_before_it_is_fetched(tmp_path: Path, store: Store) -> None:
    """A variant for another instruction set, and one for this machine's."""
    here = this_device().isa
    (tmp_path / "main.engine").write_bytes(b"engine")
    file = BundleFile("main.engine", "artifact", "application/octet-stream", tmp_path / "main.engine")
    variants = []
    for target, isa in (("elsewhere", "riscv128"), ("here", here)):
        runtime = Runtime.model_validate({"requires": "a CPU", "needs": {"isa": isa}})
        record = compiled_record(target, tmp_path / "main.engine").model_copy(update={"runtime": runtime})
        variants.append(VariantContent(record, [file]))
    bundle = open_bundle(write_bundle(tmp_path / "b", BundleContent("m", "1", {}, variants)).path)
    with pytest.raises(InputError, match="cannot run on this device"):
        pull_from(f"oci:{bundle.path}", "elsewhere", tmp_path / "out", store=store, check=True)
    assert not (tmp_path / "out").exists()
    assert not store.home.exists()
    pulled = pull_from(f"oci:{bundle.path}", "here", tmp_path / "out", store=store, check=True)
    assert pulled.checks["here"].met
    pull_from(f"oci:{bundle.path}", "elsewhere", tmp_path / "out", store=store)  # for another device


# -- replacing


def test_a_checkout_is_replaced_by_what_is_asked_for(
    tmp_path: Path, stub: Stub, store: Store, make_bundle: MakeBundle
) -> None:
    place, out = f"{stub.host}/a/b:1.2.0", tmp_path / "out"
    assert not pull_from(place, "t4", out, CONNECTION, store=store).unchanged
    before = (out / "t4" / "main.engine").stat()
    (record,) = store.home.glob("steps/*.json")
    os.utime(record, (0, 0))
    assert pull_from(place, "t4", out, CONNECTION, store=store).unchanged
    assert record.stat().st_mtime > 0, "a prune goes by when it was last wanted"
    assert (out / "t4" / "main.engine").stat().st_ino == before.st_ino
    pull_from(place, "a100", out, CONNECTION, store=store)
    assert sorted(path.name for path in out.iterdir()) == [".modelforge", "a100"]
    newer = make_bundle(version="1.3.0")
    stub.take(newer)
    assert pull_from(f"{stub.host}/a/b:1.3.0", "a100", out, CONNECTION, store=store).digest == newer.digest


@pytest.mark.parametrize("change", ["edit", "remove", "add", "add to target", "documents"])
def test_a_changed_checkout_is_not_replaced_unless_forced(
    tmp_path: Path, stub: Stub, store: Store, change: str
) -> None:
    place, out = f"{stub.host}/a/b:1.2.0", tmp_path / "out"
    pull_from(place, "t4", out, CONNECTION, store=store)
    whole = tree(out)
    if change == "edit":
        (out / "t4" / "main.engine").write_bytes(bytes(200_000))
    elif change == "remove":
        (out / "t4" / "main.engine").unlink()
    elif change == "documents":
        next((out / ".modelforge" / "blobs" / "sha256").iterdir()).unlink()
    else:
        (out / ("t4" if "target" in change else "") / "notes.txt").write_text("mine")
    changed = tree(out)
    with pytest.raises(InputError, match="--force"):
        pull_from(place, "t4", out, CONNECTION, store=store)
    assert tree(out) == changed
    pull_from(place, "t4", out, CONNECTION, store=store, force=True)
    assert tree(out) == whole


def test_an_error_leaves_what_stood_there(tmp_path: Path, stub: Stub, store: Store, bundle: Bundle) -> None:
    place, out = f"{stub.host}/a/b:1.2.0", tmp_path / "out"
    pull_from(place, "t4", out, CONNECTION, store=store)
    before = tree(out)
    engine = bundle.select("a100")[0].files["main.engine"].digest
    stub.blobs[engine] = bytes(200_000)
    with pytest.raises(ModelForgeError):
        pull_from(place, "a100", out, CONNECTION, store=store)
    assert tree(out) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_help_is_quick_and_light(forge: Forge) -> None:
    """No requests, no pydantic for a help text; what a pull imports is no numpy."""
    code = (
        "import sys; from modelforge.cli.main import main\n"
        "try: main(['pull', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(1 if {'requests', 'pydantic', 'rich', 'numpy'} & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=forge.env(), capture_output=True, check=False)
    assert done.returncode == 0
    code = (
        "import sys, modelforge.registry.pull, modelforge.registry.push, modelforge.registry.session\n"
        "sys.exit(str({'numpy', 'onnx', 'cryptography'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=forge.env(), capture_output=True, check=False)
    assert not done.stderr.strip()

"""A registry that lies, stalls and tempts: nothing wrong is accepted or written outside, and every case ends soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelforge.bundle import format as words
from modelforge.bundle.read import Bundle
from modelforge.errors import InputError, IntegrityError, ModelForgeError, RegistryError
from modelforge.registry.session import Connection
from modelforge.store import Store, digest_bytes
from tests.registry.conftest import HASTY, QUICK, MakeBundle
from tests.registry.hostile import Handler, Stub, serving, silent_port
from tests.registry.pulling import pull_from, tree

CONNECTION = Connection(limits=QUICK)
HURRIED = Connection(limits=HASTY)
LONGEST = 30.0
"""Seconds that any case may take: attempts, waits and all, on a busy machine. Half of what any one wait may take."""


@pytest.fixture
def stub(bundle: Bundle) -> Iterator[Stub]:
    """Serves the bundle, honestly until told otherwise."""
    with serving(Stub()) as stub:
        stub.take(bundle)
        yield stub


@pytest.fixture
def engine(bundle: Bundle) -> str:
    """Digest of the blob that tests tamper with."""
    return bundle.select("t4")[0].files["main.engine"].digest


@pytest.fixture
def refused(tmp_path: Path, stub: Stub, store: Store) -> Callable[..., ModelForgeError]:
    """Pull; it must be refused, soon, and leave nothing but parts of downloads in the store."""

    def pull(
        said: str | None, kind: type[ModelForgeError] = IntegrityError, connection: Connection = CONNECTION
    ) -> ModelForgeError:
        outside = tree(tmp_path / "user")
        begun = time.monotonic()
        with pytest.raises(kind, match=said) as caught:
            pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out" / "here", connection, store=store)
        assert time.monotonic() - begun < LONGEST
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        for blob in (store.home / "blobs" / "sha256").glob("*"):
            assert digest_bytes(blob.read_bytes()) == f"sha256:{blob.name}"
        assert tree(tmp_path / "user") == outside
        return caught.value

    return pull


def only(kind: str, name: str | None, act: Callable[[Handler], Any]) -> Callable[[Handler, str, str], bool]:
    """Misbehave for one thing, and be honest otherwise."""

    def misbehave(handler: Handler, here: str, what: str) -> bool:
        if here != kind or name not in (None, what):
            return False
        act(handler)
        return True

    return misbehave


def test_the_stub_is_a_registry(tmp_path: Path, stub: Stub, bundle: Bundle, store: Store) -> None:
    """When it is honest, pulls from it succeed: what follows fails for the reasons given, and for no other."""
    assert pull_from(f"{stub.host}/a/b:1.2.0", None, tmp_path / "out", CONNECTION, store=store).digest == bundle.digest
    assert tree(tmp_path / "out") == tree(bundle.path)


# -- wrong content


def test_tampered_blob(refused: Callable[..., Any], stub: Stub, engine: str, store: Store) -> None:
    stub.blobs[engine] = b"x" + stub.blobs[engine][1:]
    refused("not what its digest says")
    assert not (store.home / "ingest" / f"{engine[7:]}.part").exists()


def test_truncated_blob_with_a_consistent_length(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    data = stub.blobs[engine]
    stub.misbehave = only("blobs", engine, lambda handler: handler.answer(200, data[: len(data) // 2]))
    refused("the download ended after 100000 of 200000 bytes")


def test_connection_cut_within_a_blob(tmp_path: Path, stub: Stub, engine: str, store: Store, bundle: Bundle) -> None:
    """Goes on where it was cut, and takes no byte twice."""
    data = stub.blobs[engine]

    def cut(handler: Handler) -> None:
        begin = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        head = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        handler.answer(206 if begin else 200, data[begin : begin + 60_000], head, length=len(data) - begin)

    stub.misbehave = only("blobs", engine, cut)
    pulled = pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION, store=store)
    assert pulled.fetched == 300_000
    ranges = [seen[3] for seen in stub.seen if engine in seen[1]]
    assert ranges == [None, "bytes=60000-199999", "bytes=120000-199999", "bytes=180000-199999"]
    assert (tmp_path / "out" / "t4" / "main.engine").read_bytes() == data


def test_wrong_manifest_for_a_digest(refused: Callable[..., Any], stub: Stub, bundle: Bundle) -> None:
    (t4,), (a100,) = bundle.select("t4"), bundle.select("a100")
    stub.manifests[t4.digest] = stub.manifests[a100.digest]
    refused("answers with another manifest")


def test_wrong_record_for_a_digest(refused: Callable[..., Any], stub: Stub, bundle: Bundle) -> None:
    manifest = json.loads(stub.manifests[bundle.select("t4")[0].digest][1])
    stub.blobs[manifest["config"]["digest"]] += b" "
    refused("answers with another blob than its digest says")


def test_index_that_is_not_what_its_header_says(refused: Callable[..., Any], stub: Stub) -> None:
    media_type, data = stub.manifests["1.2.0"]
    headers = {"Content-Type": media_type, "Docker-Content-Digest": "sha256:" + "0" * 64}
    stub.misbehave = only("manifests", "1.2.0", lambda handler: handler.answer(200, data, headers))
    refused("answers with another manifest")


def test_a_digest_that_was_asked_for_decides(
    tmp_path: Path, stub: Stub, bundle: Bundle, make_bundle: MakeBundle
) -> None:
    other = make_bundle(seed=8)
    stub.take(other)
    stub.manifests[bundle.digest] = stub.manifests[other.digest]
    with pytest.raises(IntegrityError, match="another manifest"):
        pull_from(f"{stub.host}/a/b@{bundle.digest}", "t4", tmp_path / "out", CONNECTION)


@pytest.mark.parametrize(
    "garbage", [b"", b"[]", b"{", b'{"manifests": 7}', b"[" * 100_000, b'{"a": NaN}', b"\xff" * 99]
)
def test_documents_of_garbage(refused: Callable[..., Any], stub: Stub, garbage: bytes) -> None:
    stub.manifests["1.2.0"] = (words.INDEX_TYPE, garbage)
    refused(None, ModelForgeError)


@pytest.mark.parametrize("garbage", [b"{}", b'{"tags": [7]}', b'{"tags": ["\\u001b[2J"]}', b'{"tags": "1.2.0"}', b"[]"])
def test_lists_of_garbage(tmp_path: Path, stub: Stub, garbage: bytes) -> None:
    stub.misbehave = only("tags", None, lambda handler: handler.answer(200, garbage))
    with pytest.raises(ModelForgeError) as caught:
        pull_from(f"{stub.host}/a/b:1.x", "t4", tmp_path / "out", CONNECTION)
    assert str(caught.value).replace("\n", "").isprintable()


def test_what_it_says_is_made_printable(refused: Callable[..., Any], stub: Stub) -> None:
    body = json.dumps({"errors": [{"code": "DENIED", "message": "\x1b]0;gotcha\x07" * 1000}]}).encode()
    stub.misbehave = only("manifests", None, lambda handler: handler.answer(403, body))
    error = refused("HTTP 403: DENIED")
    assert str(error).replace("\n", "").isprintable()
    assert len(str(error)) < 600


# -- wrong sizes


def test_longer_blob(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    stub.blobs[engine] += b"more"
    refused("announces 200004 bytes where 200000 belong")


def test_endless_blob(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    def endless(handler: Handler) -> None:
        handler.begin(200)
        while not stub.ended.is_set():
            handler.wfile.write(bytes(1 << 16))

    stub.misbehave = only("blobs", engine, endless)
    refused("sends more than the 200000 bytes")


@pytest.mark.parametrize(("kind", "name"), [("manifests", "1.2.0"), ("tags", None)])
def test_endless_document(refused: Callable[..., Any], stub: Stub, kind: str, name: str | None) -> None:
    def endless(handler: Handler) -> None:
        handler.begin(200, {"Content-Type": words.INDEX_TYPE})
        while not stub.ended.is_set():
            handler.wfile.write(b" " * (1 << 16))

    stub.misbehave = only(kind, name, endless)
    if kind == "tags":
        del stub.manifests["1.2.0"]
    refused("more than 4194304 bytes")


def test_endless_chunks_of_one_byte(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    def chunks(handler: Handler) -> None:
        handler.begin(200, {"Transfer-Encoding": "chunked"})
        while not stub.ended.is_set():
            handler.wfile.write(b"1\r\nx\r\n" * 1000)

    stub.misbehave = only("blobs", engine, chunks)
    refused("sends more than the 200000 bytes")


def test_wrong_content_length(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    data = stub.blobs[engine]
    stub.misbehave = only("blobs", engine, lambda handler: handler.answer(200, data[:5000], length=5000))
    refused("ended after 5000 of 200000 bytes")


@pytest.mark.parametrize("length", ["-1", "1e9", "9" * 5000, "12, 13"])
def test_garbled_content_length(refused: Callable[..., Any], stub: Stub, engine: str, length: str) -> None:
    def garbled(handler: Handler) -> None:
        handler.begin(200, {"Content-Length": length})
        handler.wfile.write(b"x" * 100)

    stub.misbehave = only("blobs", engine, garbled)
    refused(None)


def test_a_manifest_said_to_be_huge(refused: Callable[..., Any], stub: Stub, bundle: Bundle) -> None:
    _spoil_index(stub, bundle, lambda index: index["manifests"][-2].update(size=1 << 40))
    refused("a manifest of")


def test_a_record_said_to_be_huge(refused: Callable[..., Any], stub: Stub, bundle: Bundle) -> None:
    _spoil_manifest(stub, bundle, lambda manifest: manifest["config"].update(size=1 << 40))
    refused("at most 4194304")


def test_documents_that_are_too_much_together(
    refused: Callable[..., Any], stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelforge.registry.pull._DOCUMENTS_LIMIT", 1000)
    refused("more than 1000 bytes of manifests and records")


def test_no_room_for_what_it_announces(refused: Callable[..., Any], stub: Stub, bundle: Bundle) -> None:
    """Told before anything is fetched."""

    def spoil(manifest: dict[str, Any]) -> None:
        manifest["layers"][1]["size"] = 1 << 60

    _spoil_manifest(stub, bundle, spoil)
    refused("no space", ModelForgeError)


def test_another_part_than_was_asked_for(refused: Callable[..., Any], stub: Stub, engine: str, store: Store) -> None:
    (store.home / "ingest").mkdir(parents=True)
    (store.home / "ingest" / f"{engine[7:]}.part").write_bytes(stub.blobs[engine][:1000])
    head = {"Content-Range": "bytes 0-198999/199000"}
    stub.misbehave = only("blobs", engine, lambda handler: handler.answer(206, stub.blobs[engine][:199_000], head))
    refused("another part")


def test_all_of_it_to_a_range_request(tmp_path: Path, stub: Stub, engine: str, store: Store) -> None:
    """200 to a Range request: the answer begins at the beginning, and so do we."""
    (store.home / "ingest").mkdir(parents=True)
    (store.home / "ingest" / f"{engine[7:]}.part").write_bytes(stub.blobs[engine][:1000])
    stub.misbehave = only("blobs", engine, lambda handler: handler.answer(200, stub.blobs[engine]))
    pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION, store=store)
    assert [seen[3] for seen in stub.seen if engine in seen[1]] == ["bytes=1000-199999"]
    assert (tmp_path / "out" / "t4" / "main.engine").read_bytes() == stub.blobs[engine]


def test_a_rotten_part_of_an_earlier_download_is_thrown_away(
    tmp_path: Path, stub: Stub, engine: str, store: Store
) -> None:
    (store.home / "ingest").mkdir(parents=True)
    (store.home / "ingest" / f"{engine[7:]}.part").write_bytes(b"x" * 1000)
    pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION, store=store)
    assert (tmp_path / "out" / "t4" / "main.engine").read_bytes() == stub.blobs[engine]


def test_a_compressed_blob(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    stub.misbehave = only("blobs", engine, lambda handler: handler.answer(200, b"x", {"Content-Encoding": "gzip"}))
    refused("compressed")


# -- redirects and credentials


def test_redirect_loop(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    here = f"/v2/a/b/blobs/{engine}"
    stub.misbehave = only("blobs", engine, lambda handler: handler.answer(307, headers={"Location": here}))
    refused("redirects")
    assert len([seen for seen in stub.seen if engine in seen[1]]) == QUICK.redirects + 1


@pytest.mark.parametrize(
    "location", ["http://[", "file:///etc/passwd", "gopher://127.0.0.1/", "http://127.0.0.1:1/", "//", "http://\x7f/"]
)
def test_redirects_to_nowhere(refused: Callable[..., Any], stub: Stub, engine: str, location: str) -> None:
    stub.misbehave = only("blobs", engine, lambda handler: handler.answer(307, headers={"Location": location}))
    refused(None)


def test_credentials_do_not_follow_a_redirect(
    tmp_path: Path, stub: Stub, engine: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry gets them, the host that it redirects to does not."""
    _login(tmp_path, monkeypatch, stub.host)

    def locked(handler: Handler, kind: str, name: str) -> bool:
        if kind == "root":
            return False
        if not handler.headers.get("Authorization"):
            handler.answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        elif name == engine:
            handler.answer(307, headers={"Location": f"http://{other.host}/v2/a/b/blobs/{engine}"})
        else:
            return False
        return True

    with serving(Stub(blobs=dict(stub.blobs))) as other:
        stub.misbehave = locked
        pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION)
        assert [seen[2] for seen in other.seen] == [None]
    assert any(seen[2] for seen in stub.seen)
    # What finds out whether it speaks http sends none either.
    assert stub.seen[0][:3] == ("GET", "/v2/", None)


def test_no_credentials_for_another_registry(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    _login(tmp_path, monkeypatch, "127.0.0.1:1")
    (tmp_path / "user" / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    stub.misbehave = only("manifests", None, lambda handler: handler.answer(401, headers=challenge))
    with pytest.raises(RegistryError, match="401"):
        pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION)
    assert {seen[2] for seen in stub.seen} == {None}


@pytest.mark.parametrize(
    "realm", ["http://registry.example.com/token", "ftp://x/", "http://127.0.0.1@evil.example/", ""]
)
def test_no_credentials_for_a_token_service_without_https(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, realm: str
) -> None:
    _login(tmp_path, monkeypatch, stub.host)
    challenge = {"WWW-Authenticate": f'Bearer realm="{realm}",service="x"'}
    stub.misbehave = only("manifests", None, lambda handler: handler.answer(401, headers=challenge))
    with pytest.raises(RegistryError, match=r"without https|credentials in its URL"):
        pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION)


def test_endless_challenges(refused: Callable[..., Any], stub: Stub) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="http://{stub.host}/token",service="x"'}

    def locked(handler: Handler, kind: str, name: str) -> bool:
        if handler.path.startswith("/token"):
            handler.answer(200, b'{"token": "useless"}')
        elif kind == "manifests":
            handler.answer(401, headers=challenge)
        else:
            return False
        return True

    stub.misbehave = locked
    refused("401")
    assert len(stub.seen) < 6


# -- bad weather


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("kind", ["manifests", "blobs"])
def test_a_storm_ends(refused: Callable[..., Any], stub: Stub, status: int, kind: str) -> None:
    stub.misbehave = only(kind, None, lambda handler: handler.answer(status, headers={"Retry-After": "1000000"}))
    refused(f"HTTP {status}.*tried {QUICK.attempts} times")


def test_a_squall_passes(tmp_path: Path, stub: Stub, bundle: Bundle) -> None:
    left = {"manifests": [429, 503], "blobs": [500, 502], "referrers": [504]}

    def squall(handler: Handler, kind: str, name: str) -> bool:
        if not left.get(kind):
            return False
        handler.answer(left[kind].pop())
        return True

    stub.misbehave = squall
    pulled = pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION)
    assert pulled.digest == bundle.digest
    assert not any(left.values())


@pytest.mark.parametrize("status", [400, 403, 405, 410])
def test_what_will_not_change_is_not_tried_again(refused: Callable[..., Any], stub: Stub, status: int) -> None:
    stub.misbehave = only("manifests", None, lambda handler: handler.answer(status))
    refused(f"HTTP {status}")
    assert len([seen for seen in stub.seen if "manifests" in seen[1]]) == 1


def test_slow_loris_in_a_blob(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    def slow(handler: Handler) -> None:
        handler.begin(200, {"Content-Length": "200000"})
        stub.drip(handler, stub.blobs[engine])

    stub.misbehave = only("blobs", engine, slow)
    refused("too slowly", connection=HURRIED)


def test_slow_loris_in_a_document(refused: Callable[..., Any], stub: Stub) -> None:
    def slow(handler: Handler) -> None:
        handler.begin(200, {"Content-Length": "100000", "Content-Type": words.INDEX_TYPE})
        stub.drip(handler, b" " * 100_000)

    stub.misbehave = only("manifests", None, slow)
    refused("too slowly", connection=HURRIED)


def test_slow_loris_in_the_head(refused: Callable[..., Any], stub: Stub) -> None:
    stub.misbehave = only(
        "manifests", None, lambda handler: stub.drip(handler, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999)
    )
    refused("too slowly", connection=HURRIED)


def test_slow_loris_in_chunk_lines(refused: Callable[..., Any], stub: Stub, engine: str) -> None:
    def slow(handler: Handler) -> None:
        handler.begin(200, {"Transfer-Encoding": "chunked"})
        stub.drip(handler, b"0" * 60_000)

    stub.misbehave = only("blobs", engine, slow)
    refused("too slowly", connection=HURRIED)


def test_silence(tmp_path: Path) -> None:
    begun = time.monotonic()
    with silent_port() as host, pytest.raises(RegistryError, match="too slowly, or not at all"):
        pull_from(f"{host}/a/b:1.2.0", "t4", tmp_path / "out", HURRIED)
    assert time.monotonic() - begun < LONGEST


def test_nobody_there_fails_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(RegistryError, match="nothing listens there"):
        pull_from("127.0.0.1:1/a/b:1.2.0", "t4", tmp_path / "out")
    with pytest.raises(RegistryError, match="no such host"):
        pull_from("registry.invalid/a/b:1.2.0", "t4", tmp_path / "out")
    assert time.monotonic() - begun < LONGEST


@pytest.mark.parametrize(
    "head", [b"HTTP/9.9 hello\r\n\r\n", b"\x00" * 100, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000]
)
def test_heads_of_garbage(refused: Callable[..., Any], stub: Stub, head: bytes) -> None:
    def garbage(handler: Handler) -> None:
        handler.wfile.write(head)
        handler.close_connection = True

    stub.misbehave = only("manifests", None, garbage)
    refused(None)


def test_lists_without_end(tmp_path: Path, stub: Stub) -> None:
    more = {"Link": '</v2/a/b/tags/list?n=1>; rel="next"'}
    stub.misbehave = only("tags", None, lambda handler: handler.answer(200, b'{"tags": ["a"]}', more))
    with pytest.raises(RegistryError, match="does not end"):
        pull_from(f"{stub.host}/a/b:1.x", "t4", tmp_path / "out", CONNECTION)


def test_a_list_that_goes_on_elsewhere(tmp_path: Path, stub: Stub) -> None:
    more = {"Link": '<http://127.0.0.1:1/v2/a/b/tags/list>; rel="next"'}
    stub.misbehave = only("tags", None, lambda handler: handler.answer(200, b'{"tags": ["a"]}', more))
    with pytest.raises(RegistryError, match="goes on elsewhere"):
        pull_from(f"{stub.host}/a/b:1.x", "t4", tmp_path / "out", CONNECTION)


# -- names and links


@pytest.mark.parametrize(
    "title",
    ["../evil", "/etc/evil", "..", "a/b", "a\\b", "C:evil", "", "nul", "x\0y", ".modelforge", "-rf", "LOWERED.onnx"],
)
def test_titles_that_lead_elsewhere(refused: Callable[..., Any], stub: Stub, bundle: Bundle, title: str) -> None:
    def spoil(manifest: dict[str, Any]) -> None:
        engine = next(layer for layer in manifest["layers"] if layer["annotations"][words.TITLE] == "main.engine")
        engine["annotations"][words.TITLE] = title

    _spoil_manifest(stub, bundle, spoil)
    refused(None)


@pytest.mark.parametrize("stage", ["../../evil", "a/b", "..", "lowered.onnx", ".git"])
def test_stages_that_lead_elsewhere(tmp_path: Path, stub: Stub, bundle: Bundle, store: Store, stage: str) -> None:
    def spoil(record: dict[str, Any]) -> None:
        record["stage"] = stage

    _spoil_record(stub, bundle, spoil, {words.STAGE: stage})
    if stage == "lowered.onnx":  # beside no file of the main stage this is a name as any other
        assert pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION, store=store).digest
        assert (tmp_path / "out" / "t4" / "lowered.onnx" / "main.engine").is_file()
        return
    with pytest.raises(IntegrityError, match="cannot be a folder"):
        pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION, store=store)
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_target(refused: Callable[..., Any], stub: Stub, bundle: Bundle) -> None:
    _spoil_index(stub, bundle, lambda index: index["manifests"][0]["annotations"].update({words.TARGET: "t4"}))
    _spoil_index(stub, bundle, lambda index: index["manifests"][-2]["annotations"].update({words.TARGET: "a100"}))
    refused("labels a variant")


@pytest.mark.parametrize("force", [False, True])
def test_links_in_the_output_are_not_followed(
    tmp_path: Path, stub: Stub, bundle: Bundle, store: Store, force: bool
) -> None:
    """A checkout in which somebody put links: without --force it stays, with it the links go, and what they lead to
    stays as it was."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "main.engine").write_bytes(b"precious")
    out = tmp_path / "out"
    place = f"{stub.host}/a/b:1.2.0"
    pull_from(place, "t4", out, CONNECTION, store=store)
    (out / "t4" / "main.engine").unlink()
    (out / "t4" / "main.engine").symlink_to(outside / "main.engine")
    (out / "a100").symlink_to(outside)
    if force:
        pull_from(place, ("t4", "a100"), out, CONNECTION, store=store, force=True)
        assert not (out / "a100").is_symlink()
        assert (out / "t4" / "main.engine").read_bytes() == stub.blobs[
            bundle.select("t4")[0].files["main.engine"].digest
        ]
    else:
        with pytest.raises(InputError, match="changed"):
            pull_from(place, ("t4", "a100"), out, CONNECTION, store=store)
        assert (out / "a100").is_symlink()
    assert tree(outside) == {"main.engine": b"precious"}


@pytest.mark.parametrize("what", ["link", "file", "folder", "dangling"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, stub: Stub, store: Store, what: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    out = tmp_path / "out"
    if what == "link":
        out.symlink_to(precious)
    elif what == "dangling":
        out.symlink_to(tmp_path / "nowhere")
    elif what == "file":
        out.write_text("keep")
    else:
        out.mkdir()
        (out / "file").write_text("keep")
    for force in (False, True):
        with pytest.raises(InputError):
            pull_from(f"{stub.host}/a/b:1.2.0", "t4", out, CONNECTION, store=store, force=force)
    assert (precious / "file").read_text() == "keep"
    assert out.is_symlink() == (what in ("link", "dangling"))
    assert not (tmp_path / "nowhere").exists()


def test_a_link_in_the_place_of_a_part(tmp_path: Path, stub: Stub, engine: str, store: Store) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (store.home / "ingest").mkdir(parents=True)
    (store.home / "ingest" / f"{engine[7:]}.part").symlink_to(victim)
    pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION, store=store)
    assert victim.read_text() == "keep"
    assert (tmp_path / "out" / "t4" / "main.engine").read_bytes() == stub.blobs[engine]


# -- spoiling what is served, digests and all


def _spoil_index(stub: Stub, bundle: Bundle, spoil: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads(stub.manifests["1.2.0"][1])
    spoil(index)
    stub.manifests["1.2.0"] = (words.INDEX_TYPE, words.go_json(index))


def _spoil_manifest(
    stub: Stub, bundle: Bundle, spoil: Callable[[dict[str, Any]], None], labels: dict[str, str] | None = None
) -> None:
    (variant,) = bundle.select("t4")
    manifest = json.loads(stub.manifests[variant.digest][1])
    spoil(manifest)
    data = words.go_json(manifest)
    digest = digest_bytes(data)
    stub.manifests[digest] = (words.MANIFEST_TYPE, data)

    def lead(index: dict[str, Any]) -> None:
        entry = next(entry for entry in index["manifests"] if entry["digest"] == variant.digest)
        entry.update(digest=digest, size=len(data))
        entry["annotations"].update(labels or {})

    _spoil_index(stub, bundle, lead)


def _spoil_record(stub: Stub, bundle: Bundle, spoil: Callable[[dict[str, Any]], None], labels: dict[str, str]) -> None:
    (variant,) = bundle.select("t4")
    record = variant.record.to_json()
    spoil(record)
    data = json.dumps(record).encode()
    digest = digest_bytes(data)
    stub.blobs[digest] = data

    def lead(manifest: dict[str, Any]) -> None:
        manifest["config"].update(digest=digest, size=len(data))

    _spoil_manifest(stub, bundle, lead, labels)


def _login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {host: {"auth": "cm9ib3Q6c2VjcmV0"}}}))  # robot:secret
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))

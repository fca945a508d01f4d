"""Uploads: broken ones go on where they stopped, in this process or the next; nothing wrong is finished."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelforge.errors import IntegrityError, RegistryError
from modelforge.registry.client import Client
from modelforge.registry.limits import Limits
from modelforge.registry.transport import Transport
from modelforge.registry.upload import Notes, upload
from modelforge.store import digest_bytes
from tests.registry.conftest import QUICK
from tests.registry.hostile import Handler, Stub, serving
from tests.registry.keeper import Keeper

DATA = random.Random(3).randbytes(3_500_000)
DIGEST = digest_bytes(DATA)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with serving(Stub()) as stub:
        yield Keeper(stub)


@pytest.fixture
def client(keeper: Keeper) -> Client:
    return a_client(keeper)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "uploads")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


def cut_for_good(begin: int) -> int | None:
    """The connection breaks in the third chunk, and then each time at once."""
    reached = 2 << 20
    return None if begin < reached else 5000 if begin == reached else 0


def a_client(keeper: Keeper, limits: Limits = QUICK) -> Client:
    return Client(Transport(keeper.stub.host, limits=limits), "a/b", writing=True)


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 20, (1 << 20) + 1, len(DATA)])
def test_sizes_around_a_chunk(tmp_path: Path, keeper: Keeper, client: Client, notes: Notes, size: int) -> None:
    (tmp_path / "blob").write_bytes(DATA[:size])
    digest = digest_bytes(DATA[:size])
    told: list[int] = []
    assert upload(client, digest, size, tmp_path / "blob", notes=notes, told=told.append) == size
    assert keeper.stub.blobs[digest] == DATA[:size]
    assert keeper.received == sum(told) == size
    patches = sum(seen[0] == "PATCH" for seen in keeper.stub.seen)
    assert patches == (0 if size <= QUICK.chunk else -(-size // QUICK.chunk))
    assert not list((tmp_path / "uploads").iterdir())


def test_a_cut_within_a_chunk_is_gone_on_from(keeper: Keeper, client: Client, notes: Notes, file: Path) -> None:
    """The registry has kept what came: that is not sent again."""
    cuts = [1_300_000, 2_500_000]

    def cut(begin: int) -> int | None:
        if cuts and begin + (1 << 20) > cuts[0]:
            return cuts.pop(0) - begin
        return None

    keeper.cut = cut
    told: list[int] = []
    upload(client, DIGEST, len(DATA), file, notes=notes, told=told.append)
    assert not cuts
    assert keeper.stub.blobs[DIGEST] == DATA
    assert keeper.received == len(DATA)
    assert sum(told) == len(DATA)


def test_another_process_goes_on(keeper: Keeper, notes: Notes, file: Path) -> None:
    keeper.cut = cut_for_good
    with pytest.raises(RegistryError, match="broke"):
        upload(a_client(keeper), DIGEST, len(DATA), file, notes=notes)
    came = keeper.received
    assert came > 2 << 20
    keeper.cut = lambda _: None
    sent = upload(a_client(keeper), DIGEST, len(DATA), file, notes=notes)
    assert sent == len(DATA) - came
    assert keeper.received == len(DATA)
    assert keeper.stub.blobs[DIGEST] == DATA


def test_an_upload_that_the_registry_forgot_begins_anew(keeper: Keeper, notes: Notes, file: Path) -> None:
    """As docker-registry does with every broken one."""
    keeper.cut = cut_for_good
    with pytest.raises(RegistryError):
        upload(a_client(keeper), DIGEST, len(DATA), file, notes=notes)
    keeper.cut = lambda _: None
    keeper.uploads.clear()
    assert upload(a_client(keeper), DIGEST, len(DATA), file, notes=notes) == len(DATA)
    assert keeper.stub.blobs[DIGEST] == DATA


def test_an_upload_that_came_but_whose_answer_was_lost(
    keeper: Keeper, client: Client, notes: Notes, file: Path
) -> None:
    lost = [True]

    def refuse(handler: Handler) -> bool:
        if handler.command == "PUT" and lost:
            lost.clear()
            keeper.stub.blobs[DIGEST] = bytes(keeper.uploads.popitem()[1])
            handler.answer(503)
            return True
        return False

    keeper.refuse = refuse
    upload(client, DIGEST, len(DATA), file, notes=notes)
    assert keeper.stub.blobs[DIGEST] == DATA


def test_mounting(keeper: Keeper, client: Client, notes: Notes, file: Path) -> None:
    keeper.mountable[DIGEST] = DATA
    assert upload(client, DIGEST, len(DATA), file, notes=notes, mount_from="other/repo") == 0
    assert keeper.received == 0
    assert "from=other%2Frepo" in keeper.stub.seen[-1][1]


def test_where_it_cannot_be_mounted_it_is_sent(keeper: Keeper, client: Client, notes: Notes, file: Path) -> None:
    assert upload(client, DIGEST, len(DATA), file, notes=notes, mount_from="other/repo") == len(DATA)
    assert keeper.stub.blobs[DIGEST] == DATA
    assert sum(seen[0] == "POST" for seen in keeper.stub.seen) == 1  # what the registry began instead is used


@pytest.mark.parametrize("size", [1000, len(DATA)])
def test_a_file_that_changed_is_not_finished(
    tmp_path: Path, keeper: Keeper, client: Client, notes: Notes, size: int
) -> None:
    (tmp_path / "blob").write_bytes(bytes(size))
    with pytest.raises(IntegrityError, match="not what its digest says"):
        upload(client, digest_bytes(DATA[:size]), size, tmp_path / "blob", notes=notes)
    assert not keeper.stub.blobs
    (tmp_path / "blob").write_bytes(DATA[: size - 1])
    with pytest.raises(IntegrityError, match="another size"):
        upload(client, digest_bytes(DATA[:size]), size, tmp_path / "blob", notes=notes)


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:1/v2/x", "https://evil.example/v2/x", "//evil.example/x", "", "http://["]
)
def test_data_goes_to_no_other_place(keeper: Keeper, client: Client, notes: Notes, file: Path, location: str) -> None:
    def refuse(handler: Handler) -> bool:
        handler.answer(202, headers={"Location": location})
        return True

    keeper.refuse = refuse
    with pytest.raises(RegistryError):
        upload(client, DIGEST, len(DATA), file, notes=notes)
    assert {seen[0] for seen in keeper.stub.seen} <= {"GET", "POST"}


def test_a_proxy_with_a_body_limit_is_named(keeper: Keeper, client: Client, notes: Notes, file: Path) -> None:
    def refuse(handler: Handler) -> bool:
        if handler.command != "PATCH":
            return False
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.answer(413, b"<html>too large</html>")
        return True

    keeper.refuse = refuse
    with pytest.raises(RegistryError, match="HTTP 413") as caught:
        upload(client, DIGEST, len(DATA), file, notes=notes)
    assert "client_max_body_size" in str(caught.value)


def test_a_registry_that_takes_nothing_ends(keeper: Keeper, client: Client, notes: Notes, file: Path) -> None:
    def refuse(handler: Handler) -> bool:
        if handler.command != "PATCH":
            return False
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.answer(202, headers={"Location": "/v2/a/b/blobs/uploads/u0", "Range": "0-0"})
        return True

    keeper.refuse = refuse
    with pytest.raises(RegistryError, match=r"does not take what is sent|lost"):
        upload(client, DIGEST, len(DATA), file, notes=notes)

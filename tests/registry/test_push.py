"""Pushing: signatures beside the index, demanded before anything is fetched; rollback and swaps are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelforge.bundle import format as words
from modelforge.bundle.read import Bundle, open_bundle
from modelforge.bundle.signing import sign, signatures
from modelforge.errors import InputError, IntegrityError, RegistryError
from modelforge.registry import reference
from modelforge.registry.client import fallback_tag
from modelforge.registry.push import retag
from modelforge.registry.session import Connection
from modelforge.store import digest_bytes
from tests.bundle.signing_keys import KeyPair, make_pair
from tests.registry.conftest import MakeBundle
from tests.registry.hostile import Stub, serving
from tests.registry.keeper import Keeper
from tests.registry.pulling import pull_from, push_to, tree
from tests.registry.servers import Registry, needs_registry

SIGSTORE = "application/vnd.dev.sigstore.bundle.v0.3+json"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyPair, KeyPair]:
    """The releaser's, and a stranger's."""
    pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
    folder = tmp_path_factory.mktemp("keys")
    return make_pair(folder / "release"), make_pair(folder / "stranger")


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    """A registry with the referrers API."""
    with serving(Stub()) as stub:
        yield Keeper(stub)


@pytest.fixture(params=["docker-registry", "with referrers API"])
def place(request: pytest.FixtureRequest) -> str:
    """``HOST/REPO`` in a registry without the referrers API, and in one with it."""
    if request.param == "docker-registry":
        return str(request.getfixturevalue("repository"))
    return f"{request.getfixturevalue('keeper').stub.host}/a/b"


@pytest.fixture
def signed(make_bundle: MakeBundle, keys: tuple[KeyPair, KeyPair]) -> Callable[[str], Bundle]:
    def make(version: str = "1.2.0") -> Bundle:
        bundle = make_bundle(version=version, size=2000)
        sign(bundle.path, keys[0].key)
        return bundle

    return make


def test_signatures_go_along_and_come_back(
    tmp_path: Path, place: str, signed: Callable[..., Bundle], keys: tuple[KeyPair, KeyPair]
) -> None:
    bundle = signed()
    sign(bundle.path, keys[1].key)
    assert push_to(bundle, place).signatures == 2
    assert push_to(bundle, place).sent == 0
    for output, target in (("all", None), ("t4", "t4")):
        pulled = pull_from(f"{place}:1.2.0", target, tmp_path / output, keys=[keys[0].public])
        assert [each.key for each in pulled.verified] == [keys[0].public]
        assert pulled.signatures == 2
    assert tree(tmp_path / "all") == tree(bundle.path)
    assert signatures(tmp_path / "t4" / ".modelforge") == signatures(bundle.path)
    assert open_bundle(tmp_path / "t4").digest == bundle.digest


def test_a_signature_that_comes_later_is_added(
    place: str, tmp_path: Path, make_bundle: MakeBundle, keys: tuple[KeyPair, KeyPair]
) -> None:
    bundle = make_bundle(size=2000)
    push_to(bundle, place)
    with pytest.raises(IntegrityError, match="not signed") as caught:
        pull_from(f"{place}:1.2.0", "t4", tmp_path / "out", keys=[keys[0].public])
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "home" / "blobs").exists(), "nothing was fetched"
    sign(bundle.path, keys[0].key)
    assert push_to(bundle, place).signatures == 1
    assert pull_from(f"{place}:1.2.0", "t4", tmp_path / "out", keys=[keys[0].public]).verified
    with pytest.raises(IntegrityError, match="not signed by"):
        pull_from(f"{place}:1.2.0", "t4", tmp_path / "other", keys=[keys[1].public])


def test_rollback_and_tag_swap_are_refused(
    tmp_path: Path, place: str, signed: Callable[..., Bundle], keys: tuple[KeyPair, KeyPair]
) -> None:
    """An older release, well signed, under a newer tag; found also where a channel's tag cannot tell."""
    old = signed("1.2.0")
    push_to(old, place)
    where = reference.registry(f"{place}:1.2.0")
    for tag in ("1.3.0", "stable"):
        retag(Connection().client(where, writing=True), where, tag)
        with pytest.raises(IntegrityError, match=r"signed as ppocr-cls 1\.2\.0, not as"):
            pull_from(f"{place}:{tag}", "t4", tmp_path / "out", keys=[keys[0].public])
    assert not (tmp_path / "out").exists()
    # By range the alias is passed over, by digest there is no promise to break.
    if "test/" in place:
        assert pull_from(f"{place}:1.x", "t4", tmp_path / "range", keys=[keys[0].public]).version == "1.2.0"
    assert pull_from(f"{place}@{old.digest}", "t4", tmp_path / "digest", keys=[keys[0].public]).version == "1.2.0"


def test_an_index_with_one_variant_swapped_is_refused(
    tmp_path: Path, keeper: Keeper, signed: Callable[..., Bundle], keys: tuple[KeyPair, KeyPair]
) -> None:
    """The signature of the true index stands beside the false one, whose labels say what was asked for."""
    bundle, place = signed(), f"{keeper.stub.host}/a/b"
    push_to(bundle, place)
    index = json.loads(keeper.stub.manifests["1.2.0"][1])
    entries = {entry["annotations"].get(words.TARGET): entry for entry in index["manifests"]}
    entries["t4"].update(digest=entries["a100"]["digest"], size=entries["a100"]["size"])
    data = words.go_json(index)
    keeper.stub.manifests["1.2.0"] = keeper.stub.manifests[digest_bytes(data)] = (words.INDEX_TYPE, data)
    for digest, (media_type, document) in list(keeper.stub.manifests.items()):
        manifest = json.loads(document)
        if manifest.get("artifactType") == SIGSTORE:
            manifest["subject"].update(digest=digest_bytes(data), size=len(data))
            keeper.stub.manifests[digest_bytes(words.go_json(manifest))] = (media_type, words.go_json(manifest))
            del keeper.stub.manifests[digest]
    for given in ([keys[0].public], []):
        with pytest.raises(IntegrityError, match="another bundle"):
            pull_from(f"{place}:1.2.0", "t4", tmp_path / "out", keys=given)
    assert not (tmp_path / "home" / "blobs").exists()


def test_the_policy_of_the_user_is_demanded(
    tmp_path: Path, place: str, signed: Callable[..., Bundle], keys: tuple[KeyPair, KeyPair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    push_to(signed(), place)
    policy = tmp_path / "policy.toml"
    monkeypatch.setenv("MODELFORGE_CONFIG", str(policy))
    policy.write_text(f'[[require]]\nrepository = "{place}"\nkeys = ["{keys[1].public}"]\n')
    with pytest.raises(IntegrityError, match="not signed by"):
        pull_from(f"{place}:1.2.0", "t4", tmp_path / "out")
    with pytest.raises(IntegrityError, match="not signed by"):  # a key on the command line does not weaken it
        pull_from(f"{place}:1.2.0", "t4", tmp_path / "out", keys=[keys[0].public])
    policy.write_text(f'[[require]]\nrepository = "{place}"\nkeys = ["{keys[0].public}"]\n')
    assert len(pull_from(f"{place}:1.2.0", "t4", tmp_path / "out").verified) == 1


def test_a_broken_signature_is_refused_without_keys_too(
    tmp_path: Path, keeper: Keeper, signed: Callable[..., Bundle]
) -> None:
    bundle = signed()
    (file,) = (bundle.path / "signatures").iterdir()
    document = json.loads(file.read_bytes())
    document["dsseEnvelope"]["payload"] = "!"
    file.write_text(json.dumps(document))
    push_to(bundle, f"{keeper.stub.host}/a/b")
    with pytest.raises(IntegrityError):
        pull_from(f"{keeper.stub.host}/a/b:1.2.0", "t4", tmp_path / "out")


@pytest.mark.registry
@needs_registry[1]
def test_the_fallback_tag_lists_every_signature_and_is_hidden(
    repository: str, signed: Callable[..., Bundle], keys: tuple[KeyPair, KeyPair]
) -> None:
    bundle = signed()
    push_to(bundle, repository)
    sign(bundle.path, keys[1].key)
    push_to(bundle, repository)
    client = Connection().client(reference.registry(repository))
    tag = fallback_tag(bundle.digest)
    index = client.manifest(tag)
    assert index is not None
    entries = client.entries(index)
    assert [entry["artifactType"] for entry in entries] == [SIGSTORE] * 2
    manifest = client.manifest(entries[0]["digest"])
    assert manifest is not None
    document = json.loads(manifest.data)
    assert document["subject"]["digest"] == bundle.digest
    assert document["config"]["mediaType"] == words.EMPTY_TYPE
    assert [layer["mediaType"] for layer in document["layers"]] == [SIGSTORE]
    assert tag not in (client.tags() or [])


def test_with_the_api_there_is_no_fallback_tag(keeper: Keeper, signed: Callable[..., Bundle]) -> None:
    bundle = signed()
    push_to(bundle, f"{keeper.stub.host}/a/b")
    assert fallback_tag(bundle.digest) not in keeper.stub.manifests


def test_the_version_appears_last(keeper: Keeper, signed: Callable[..., Bundle]) -> None:
    """Whoever sees it can pull all of it, signature included."""
    push_to(signed(), f"{keeper.stub.host}/a/b")
    written = [(seen[0], seen[1].rpartition("/")[2]) for seen in keeper.stub.seen if seen[0] == "PUT"]
    at = written.index(("PUT", "1.2.0"))
    assert all(words.is_digest(name) or "?" in name for _, name in written[:at])
    assert [name for _, name in written[at + 1 :]] == [
        f"1.2.0-{tag}" for tag in ("a100", "cortex-a76", "jetson-agx-orin", "t4")
    ]


def test_references_that_a_push_cannot_have(bundle: Bundle, tmp_path: Path) -> None:
    for text in (":1.3.0", ":latest", f"@{bundle.digest}"):
        with pytest.raises(InputError, match=r"version 1\.2\.0"):
            push_to(bundle, f"127.0.0.1:1/a/b{text}", _Unconnected())
    pull_from(f"oci:{bundle.path}", "t4", tmp_path / "out")
    with pytest.raises(InputError, match="--all"):
        push_to(tmp_path / "out", "127.0.0.1:1/a/b", _Unconnected())


def test_stages_and_what_cannot_run(keeper: Keeper, make_bundle: MakeBundle, tmp_path: Path) -> None:
    from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
    from modelforge.bundle.record import VariantRecord
    from tests.bundle.bundle_contents import compiled_record

    (tmp_path / "main.engine").write_bytes(b"engine")
    file = BundleFile("main.engine", "artifact", "application/octet-stream", tmp_path / "main.engine")
    record = compiled_record("t4", tmp_path / "main.engine")
    variants = [VariantContent(record.model_copy(update={"stage": stage}), [file]) for stage in ("head", "tail")]
    skipped = VariantContent(VariantRecord(target="rk3588", status="skipped", compiler=None, precision=None))
    path = write_bundle(tmp_path / "b", BundleContent("m", "1", {}, [*variants, skipped])).path
    pushed = push_to(path, f"{keeper.stub.host}/a/b")
    assert list(pushed.tags) == ["1", "1-t4-head", "1-t4-tail"]
    assert pushed.untagged == ("rk3588/main",)


@pytest.mark.registry
@needs_registry[1]
def test_a_tag_of_a_variant_is_a_promise_too(
    repository: str, make_bundle: MakeBundle, open_registry: Registry, tmp_path: Path
) -> None:
    push_to(make_bundle(size=2000), repository)
    where = reference.registry(f"{repository}:1.2.0")
    with pytest.raises(RegistryError, match=r"1\.2\.0-t4"):
        retag(Connection().client(where, writing=True), where, "1.2.0-t4")
    with pytest.raises(InputError, match="cannot be a tag"):
        retag(Connection().client(where, writing=True), where, "a b")
    missing = reference.registry(f"{repository}:9")
    with pytest.raises(InputError, match="no such tag"):
        retag(Connection().client(missing, writing=True), missing, "x")


class _Unconnected(Connection):
    """For what must be refused before anything is asked."""

    def client(self, place: reference.Reference, *, writing: bool = False) -> None:  # type: ignore[override]  # there is nothing to connect to
        return None

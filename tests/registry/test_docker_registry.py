"""Round trips through Debian's docker-registry: open, with a login, and with TLS behind nginx; and by skopeo."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelforge.bundle.read import Bundle, open_bundle, verify_integrity
from modelforge.errors import InputError, IntegrityError, RegistryError
from modelforge.registry import reference
from modelforge.registry.credentials import Login
from modelforge.registry.credentials import store as keep_login
from modelforge.registry.listing import list_tags, list_variants
from modelforge.registry.push import retag
from modelforge.registry.session import Connection
from tests.conftest import Forge
from tests.registry.conftest import TARGETS, MakeBundle
from tests.registry.pulling import pull_from, push_to, tree
from tests.registry.servers import NGINX, PASSWORD, USER, Registry, docker_registry, needs_registry, tls_proxy

pytestmark = needs_registry


@pytest.fixture(params=["open", "login", "tls"])
def served(request: pytest.FixtureRequest, tmp_path: Path, repository: str) -> Iterator[tuple[str, Connection]]:
    """``HOST/REPO`` and how to reach it, each way that a registry is run."""
    if request.param == "open":
        yield repository, Connection()
        return
    with docker_registry(tmp_path / "locked", with_login=True) as registry:
        if request.param == "login":
            keep_login(registry.host, Login(USER, PASSWORD))
            yield f"{registry.host}/team/model", Connection()
            return
        if NGINX is None:
            pytest.skip("nginx is not installed (apt install nginx-light)")
        with tls_proxy(tmp_path / "tls", registry.host) as (host, ca):
            keep_login(host, Login(USER, PASSWORD))
            yield f"{host}/team/model", Connection(ca_file=ca)


def test_round_trip_of_four_targets(tmp_path: Path, bundle: Bundle, served: tuple[str, Connection]) -> None:
    place, connection = served
    pushed = push_to(bundle, place, connection)
    assert pushed.digest == bundle.digest
    assert set(pushed.tags) == {"1.2.0", *(f"1.2.0-{target}" for target in TARGETS)}
    pulled = pull_from(f"{place}:1.2.0", None, tmp_path / "all", connection)
    assert pulled.digest == bundle.digest
    assert tree(tmp_path / "all") == tree(bundle.path)
    assert verify_integrity(tmp_path / "all").digest == bundle.digest


def test_one_target_fetches_its_blobs_and_a_second_reuses(
    tmp_path: Path, bundle: Bundle, open_registry: Registry, repository: str
) -> None:
    push_to(bundle, repository)
    begin = open_registry.blob_bytes()
    pulled = pull_from(f"{repository}:1.2.0", "t4", tmp_path / "t4")
    (variant,) = bundle.select("t4")
    own = sum(file.size for file in variant.files.values())
    documents = 2 * 4096  # two records, and no more: they have hundreds of bytes
    assert pulled.fetched == own == 300_000
    assert own <= open_registry.blob_bytes() - begin < own + documents
    begin = open_registry.blob_bytes()
    second = pull_from(f"{repository}:1.2.0", "a100", tmp_path / "a100")
    assert (second.fetched, second.reused) == (200_000, 100_000)  # the lowered model is shared
    assert 200_000 <= open_registry.blob_bytes() - begin < 200_000 + documents
    begin = open_registry.blob_bytes()
    assert pull_from(f"{repository}:1.2.0", "a100", tmp_path / "elsewhere").fetched == 0
    assert open_registry.blob_bytes() - begin < documents


def test_a_checkout_is_plain_files_and_opens_as_the_bundle(tmp_path: Path, bundle: Bundle, repository: str) -> None:
    push_to(bundle, repository)
    pull_from(f"{repository}:1.2.0", ("t4", "a100"), tmp_path / "out")
    files = {name for name in tree(tmp_path / "out") if not name.startswith(".modelforge/")}
    assert files == {f"{target}/{title}" for target in ("t4", "a100") for title in ("main.engine", "lowered.onnx")}
    opened = open_bundle(tmp_path / "out")
    assert opened.digest == bundle.digest
    assert opened.select("t4") == bundle.select("t4")
    assert [entry.annotations["io.modelforge.target"] for entry in opened.absent] == ["cortex-a76", "jetson-agx-orin"]
    with pytest.raises(InputError, match="not pulled"):
        opened.select("cortex-a76")
    for path, entry in opened.places().items():
        assert path.stat().st_size == entry.size
        assert path.stat().st_nlink == 1  # onnx refuses linked external data
        assert not path.is_symlink()


def test_nothing_is_sent_twice(
    bundle: Bundle, repository: str, open_registry: Registry, make_bundle: MakeBundle
) -> None:
    first = push_to(bundle, repository)
    assert first.sent > 900_000
    begin = len(open_registry.requests())
    again = push_to(bundle, repository)
    assert again.sent == 0
    assert not [line for line in open_registry.requests()[begin:] if '"P' in line], "PUT, PATCH or POST"
    elsewhere = push_to(bundle, f"{repository}-other", mount_from=reference.registry(repository).repository)
    assert elsewhere.sent == 0


def test_a_version_is_not_moved_unless_forced(
    tmp_path: Path, bundle: Bundle, repository: str, make_bundle: MakeBundle, open_registry: Registry
) -> None:
    push_to(bundle, repository)
    other = make_bundle(seed=8)
    begin = len(open_registry.requests())
    with pytest.raises(RegistryError, match=bundle.digest) as caught:
        push_to(other, repository)
    assert caught.value.exit_code == 5
    assert "--force" in str(caught.value)
    assert not [line for line in open_registry.requests()[begin:] if '"P' in line], "nothing was uploaded"
    push_to(other, repository, force=True)
    assert pull_from(f"{repository}:1.2.0", None, tmp_path / "out").digest == other.digest


def test_ranges_aliases_and_tags(tmp_path: Path, repository: str, make_bundle: MakeBundle) -> None:
    bundles = {
        version: make_bundle(version=version, size=1000) for version in ("1.2.0", "1.10.0", "2.0.0", "2.1.0-rc1")
    }
    for each in bundles.values():
        push_to(each, repository)
    where = reference.registry(f"{repository}:1.2.0")
    retag(Connection().client(where, writing=True), where, "3.0.0")  # an alias: its bundle says 1.2.0
    for text, version in {
        "latest": "2.0.0", "1.x": "1.10.0", ">=1,<1.10": "1.2.0", "2.1.0-rc1": "2.1.0-rc1", "1.2.x": "1.2.0",
    }.items():  # fmt: skip
        pulled = pull_from(f"{repository}:{text}", "t4", tmp_path / f"out-{text}")
        assert (pulled.version, pulled.digest) == (version, bundles[version].digest)
    alias = pull_from(f"{repository}:3.0.0", "t4", tmp_path / "alias")
    assert (alias.asked, alias.version) == ("3.0.0", "1.2.0")
    by_digest = pull_from(f"{repository}@{bundles['1.2.0'].digest}", "t4", tmp_path / "digest")
    assert by_digest.version == "1.2.0"
    with pytest.raises(InputError, match=r"no version in the range .4\.x"):
        pull_from(f"{repository}:4.x", "t4", tmp_path / "none")
    with pytest.raises(InputError, match=r"no tag .1\.2\.1.*did you mean .1\.2\.0"):
        pull_from(f"{repository}:1.2.1", "t4", tmp_path / "none")
    with pytest.raises(InputError, match="one manifest"):
        pull_from(f"{repository}:1.2.0-t4", "t4", tmp_path / "none")
    with pytest.raises(RegistryError, match="no such repository"):
        pull_from(f"{repository}-none:1.2.0", "t4", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_listing(bundle: Bundle, repository: str) -> None:
    push_to(bundle, repository)
    client = Connection().client(reference.registry(repository))
    lines = {line.tag: line for line in list_tags(client)}
    assert lines["1.2.0"].targets == TARGETS
    assert {tag: line.kind for tag, line in lines.items()} == {
        "1.2.0": "bundle", **{f"1.2.0-{target}": "variant" for target in TARGETS}
    }  # fmt: skip
    source = Connection().source(reference.parse(f"{repository}:1.2.0"))
    variants = list_variants(source, source.find())
    assert [(each["target"], each["precision"], each["status"], each["size"]) for each in variants] == [
        (target, "int8", "compiled", 300_000) for target in TARGETS
    ]
    assert [each["digest"] for each in variants] == [variant.digest for variant in bundle.variants]


def test_a_layout_folder_is_pulled_from_too(tmp_path: Path, bundle: Bundle, forge: Forge) -> None:
    pulled = pull_from(f"oci:{bundle.path}", "t4", tmp_path / "out")
    assert pulled.digest == bundle.digest
    assert open_bundle(tmp_path / "out").select("t4") == bundle.select("t4")
    listed = forge("ls", f"oci:{bundle.path}", "--json").json
    assert [each["target"] for each in listed["variants"]] == list(TARGETS)


def test_wrong_credentials_are_refused_at_once(tmp_path: Path, bundle: Bundle) -> None:
    with docker_registry(tmp_path / "locked", with_login=True) as registry:
        for login in (None, Login(USER, "wrong")):
            if login:
                keep_login(registry.host, login)
            with pytest.raises(RegistryError, match="401") as caught:
                push_to(bundle, f"{registry.host}/a/b")
            assert f"modelforge login {registry.host}" in str(caught.value)
            assert "wrong" not in str(caught.value)


def test_an_untrusted_certificate_is_refused(tmp_path: Path, open_registry: Registry, bundle: Bundle) -> None:
    if NGINX is None:
        pytest.skip("nginx is not installed (apt install nginx-light)")
    with tls_proxy(tmp_path / "tls", open_registry.host) as (host, _):
        with pytest.raises(RegistryError, match="certificate is not trusted") as caught:
            push_to(bundle, f"{host}/a/b")
        assert "--ca-file" in str(caught.value)


def test_the_commands(tmp_path: Path, forge: Forge, bundle: Bundle, repository: str) -> None:
    pushed = forge("push", bundle.path, repository, "--json").json
    assert pushed["digest"] == bundle.digest
    assert forge("tag", f"{repository}:1.2.0", "stable", "--json").json["digest"] == bundle.digest
    listed = forge("ls", repository, "--json").json
    assert {"1.2.0", "stable", "1.2.0-t4"} <= {line["tag"] for line in listed["tags"]}
    done = forge("pull", f"{repository}:1.x", "--target", "t4", "--json")
    assert done.json["path"] == str(tmp_path / "ppocr-cls-1.2.0")
    assert done.json["variants"][0]["target"] == "t4"
    inspected = forge("inspect", "ppocr-cls-1.2.0", "--json").json
    assert inspected["digest"] == bundle.digest
    assert {each["target"] for each in inspected["absent"]} == set(TARGETS) - {"t4"}
    assert forge("verify", "ppocr-cls-1.2.0", "--no-run").code == 0
    assert forge("pull", f"{repository}:1.x", "--target", "t4", "--json").json["unchanged"]
    assert forge("pull", f"{repository}:1.2.0").code == 2
    missing = forge("pull", f"{repository}:1.2.0", "--target", "t40")
    assert missing.code == 2
    assert all(target in missing.err for target in TARGETS)
    assert forge("push", "ppocr-cls-1.2.0", repository).code == 2  # a part of a bundle
    assert forge("push", bundle.path, f"{repository}:1.3.0").code == 2
    assert forge("prune", "--json").json["removed_blobs"] == 0
    pruned = forge("prune", "--days", "0", "--grace", "0", "--json").json
    assert (pruned["removed_variants"], pruned["removed_blobs"]) == (1, 2)
    assert forge("verify", "ppocr-cls-1.2.0", "--no-run").code == 0


def test_login_and_logout(tmp_path: Path, forge: Forge, bundle: Bundle) -> None:
    with docker_registry(tmp_path / "locked", with_login=True) as registry:
        argv = forge.argv("login", registry.host, "-u", USER, "--password-stdin")
        environment = forge.env(DOCKER_CONFIG=str(tmp_path / "docker"))

        def login(password: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(argv, input=password, env=environment, capture_output=True, text=True, check=False)

        refused = login("wrong")
        assert refused.returncode == 5
        assert not (tmp_path / "docker" / "config.json").exists()
        done = login(PASSWORD + "\n")
        assert done.returncode == 0, done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        assert (tmp_path / "docker" / "config.json").stat().st_mode & 0o777 == 0o600
        place = f"{registry.host}/a/b"
        assert forge("push", bundle.path, place, DOCKER_CONFIG=str(tmp_path / "docker")).code == 0
        if shutil.which("skopeo"):  # reads what we wrote
            subprocess.run(
                ["skopeo", "inspect", "--raw", "--tls-verify=false", "--authfile",
                 str(tmp_path / "docker" / "config.json"), f"docker://{place}:1.2.0"],
                check=True, capture_output=True,
            )  # fmt: skip
        assert forge("logout", registry.host, DOCKER_CONFIG=str(tmp_path / "docker")).code == 0
        assert forge("ls", place, DOCKER_CONFIG=str(tmp_path / "docker")).code == 5


@pytest.mark.skopeo
@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_copies_what_we_pushed_and_we_pull_what_skopeo_pushed(
    tmp_path: Path, bundle: Bundle, repository: str
) -> None:
    push_to(bundle, repository)

    def skopeo(*argv: str) -> bytes:
        return subprocess.run(["skopeo", *argv], check=True, capture_output=True).stdout

    skopeo("copy", "--all", "--src-tls-verify=false", f"docker://{repository}:1.2.0", f"oci:{tmp_path / 'copy'}:1.2.0")
    assert verify_integrity(tmp_path / "copy").digest == bundle.digest
    assert tree(tmp_path / "copy" / "blobs") == tree(bundle.path / "blobs")
    # The generic client's way to one target.
    skopeo("copy", "--src-tls-verify=false", f"docker://{repository}:1.2.0-t4", f"oci:{tmp_path / 'one'}:t4")
    (top,) = json.loads((tmp_path / "one" / "index.json").read_bytes())["manifests"]
    (variant,) = bundle.select("t4")
    assert top["digest"] == variant.digest
    for entry in variant.files.values():
        copied = tmp_path / "one" / "blobs" / "sha256" / entry.digest[7:]
        assert copied.read_bytes() == (bundle.path / "blobs" / "sha256" / entry.digest[7:]).read_bytes()
    # And back.
    skopeo("copy", "--all", "--dest-tls-verify=false", f"oci:{bundle.path}", f"docker://{repository}-skopeo:1.2.0")
    assert pull_from(f"{repository}-skopeo:1.2.0", None, tmp_path / "back").digest == bundle.digest


def test_a_damaged_bundle_is_not_released(make_bundle: MakeBundle, repository: str) -> None:
    bundle = make_bundle()
    file = bundle.file(bundle.select("t4")[0], "main.engine")
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="not what its digest says"):
        push_to(bundle, repository)
    with pytest.raises(RegistryError, match="no such repository"):
        list_tags(Connection().client(reference.registry(repository)))

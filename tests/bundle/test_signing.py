"""Signing and trusting: what was signed holds, and everything else is refused with the reason."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelforge.bundle import dsse
from modelforge.bundle.layout import write_bundle
from modelforge.bundle.provenance import read_statement, statement
from modelforge.bundle.read import Bundle, open_bundle, verify_integrity
from modelforge.bundle.signing import Verified, add_signature, require, sign, signatures, unchecked, verify_bundle
from modelforge.errors import InputError, IntegrityError
from modelforge.store import canonical_json
from tests.bundle.bundle_contents import MakeContent
from tests.bundle.signing_keys import KeyPair


@pytest.fixture
def bundle(tmp_path: Path, make_content: MakeContent) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "bundle", make_content()).path)


@pytest.fixture
def older(tmp_path: Path, make_content: MakeContent) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "older", make_content(version="1.1.0")).path)


def trust(bundle: Bundle, documents: list[bytes], *keys: KeyPair, **changes: Any) -> Verified:
    """`require` with what is true of the bundle, but for ``changes``."""
    asked = {
        "index_digest": bundle.digest,
        "name": bundle.name,
        "version": bundle.version,
        "manifests": [variant.digest for variant in bundle.variants],
    }
    return require(documents, [pair.public for pair in keys], **(asked | changes))


def signed(bundle: Bundle, pair: KeyPair) -> bytes:
    return dsse.seal(statement(bundle), pair.key)


def altered(document: bytes, change: Callable[[Any], object]) -> bytes:
    value = json.loads(document)
    change(value)
    return canonical_json(value)


# -- what holds


def test_sign_and_verify(bundle: Bundle, pair: KeyPair) -> None:
    before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
    done = sign(bundle.path, pair.key)
    assert done.path == bundle.path / "signatures" / f"{pair.key.public.id[:16]}.sigstore.json"
    assert (done.digest, done.unchanged) == (bundle.digest, False)
    after = open_bundle(bundle.path)
    assert after.digest == bundle.digest
    assert verify_integrity(bundle.path).strays == ()
    assert {path: path.read_bytes() for path in before} == before
    found = verify_bundle(after, [pair.public])
    assert (found.name, found.version, found.key, found.key_id) == (
        "ppocr-cls",
        "1.2.0",
        pair.public,
        pair.key.public.id,
    )
    assert found.statement.variants.keys() == {"t4", "a100", "jetson-agx-orin", "rk3588"}
    assert os.listdir(done.path.parent) == [done.path.name]


def test_what_is_stated(bundle: Bundle, pair: KeyPair) -> None:
    sign(bundle.path, pair.key, builder="https://ci.example.com/7")
    (name, document), *_ = signatures(bundle.path)
    value = json.loads(dsse.parse(document).payload)
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {entry["name"]: f"sha256:{entry['digest']['sha256']}" for entry in value["subject"]}
    assert subjects == {
        "ppocr-cls:1.2.0": bundle.digest,
        **{variant.record.target: variant.digest for variant in bundle.variants},
    }
    definition, details = value["predicate"]["buildDefinition"], value["predicate"]["runDetails"]
    assert definition["externalParameters"] == {
        "name": "ppocr-cls",
        "version": "1.2.0",
        "targets": ["a100", "jetson-agx-orin", "rk3588", "t4"],
    }
    assert definition["resolvedDependencies"] == [
        {"name": "model", "digest": {"sha256": "1" * 64}},
        {"name": "calibration", "digest": {"sha256": "2" * 64}},
    ]
    assert details["builder"] == {"id": "https://ci.example.com/7", "version": {"tensorrt_rtx": "1.7.1.116"}}
    assert details["modelforge_variants"]["t4"] == {
        "status": "compiled",
        "compiler": "tensorrt-rtx",
        "precision": "int8",
        "toolchain": {"tensorrt_rtx": "1.7.1.116"},
        "commands": [["tensorrt_rtx", "--onnx=lowered.onnx"]],
    }
    assert name.endswith(".sigstore.json")


def test_the_statement_is_repeatable(bundle: Bundle, pair: KeyPair) -> None:
    one, two = signed(bundle, pair), signed(bundle, pair)
    assert dsse.parse(one).payload == dsse.parse(two).payload
    assert altered(one, drop_signature) == altered(two, drop_signature)


def drop_signature(value: Any) -> None:
    value["dsseEnvelope"]["signatures"][0].pop("sig")


def test_any_of_several_keys(bundle: Bundle, pair: KeyPair, other_pair: KeyPair) -> None:
    """Rotation: the old key's signature holds while both are given, and a new one beside it does too."""
    assert trust(bundle, [signed(bundle, pair)], other_pair, pair).key == pair.public
    both = [signed(bundle, other_pair), signed(bundle, pair)]
    assert trust(bundle, both, pair).key == pair.public
    assert trust(bundle, both, other_pair).key == other_pair.public


def test_split_models_and_batch_sets_have_names(bundle: Bundle) -> None:
    from dataclasses import replace

    t4 = bundle.select("t4")[0]
    head = replace(t4, record=t4.record.model_copy(update={"stage": "head"}))
    gears = replace(t4, record=t4.record.model_copy(update={"batch": None}))
    subjects = json.loads(statement(replace(bundle, variants=(t4, head, gears))))["subject"]
    assert [entry["name"] for entry in subjects][1:] == ["t4/batch-1-4-8", "t4/head", "t4/batch-fixed"]
    with pytest.raises(InputError, match="one name"):
        statement(replace(bundle, variants=(t4, t4)))


# -- what is refused


def test_unsigned(bundle: Bundle, pair: KeyPair) -> None:
    with pytest.raises(IntegrityError, match="is not signed, and a signature is required") as caught:
        trust(bundle, [], pair)
    assert caught.value.exit_code == 5
    with pytest.raises(InputError, match="no key was given"):
        trust(bundle, [signed(bundle, pair)])


def test_another_key(bundle: Bundle, pair: KeyPair, other_pair: KeyPair) -> None:
    with pytest.raises(
        IntegrityError, match=f"is not signed by .*a signature by the key {other_pair.key.public.id[:16]}"
    ):
        trust(bundle, [signed(bundle, other_pair)], pair)


def test_another_key_under_our_keys_name(bundle: Bundle, pair: KeyPair, other_pair: KeyPair) -> None:
    def claim(value: Any) -> None:
        value["verificationMaterial"]["publicKey"]["hint"] = pair.key.public.hint
        value["dsseEnvelope"]["signatures"][0]["keyid"] = pair.key.public.id

    forged = altered(signed(bundle, other_pair), claim)
    with pytest.raises(IntegrityError, match="tampered"):
        trust(bundle, [forged], pair)
    with pytest.raises(IntegrityError, match="tampered"):  # also beside a good one
        trust(bundle, [signed(bundle, pair), forged], pair)


def test_an_older_release_under_a_newer_version(older: Bundle, pair: KeyPair) -> None:
    """Rollback: the registry serves 1.1.0, whole and signed, where 1.2.0 was asked for."""
    with pytest.raises(IntegrityError, match=r"signed as ppocr-cls 1\.1\.0, not as ppocr-cls 1\.2\.0"):
        trust(older, [signed(older, pair)], pair, version="1.2.0")


def test_another_model_under_this_name(bundle: Bundle, pair: KeyPair) -> None:
    with pytest.raises(IntegrityError, match="not as face-detector"):
        trust(bundle, [signed(bundle, pair)], pair, name="face-detector")


def test_a_signature_of_another_bundle(bundle: Bundle, older: Bundle, pair: KeyPair) -> None:
    with pytest.raises(IntegrityError, match=r"of another bundle: ppocr-cls 1\.1\.0"):
        trust(bundle, [signed(older, pair)], pair)
    add_signature(bundle.path, signed(older, pair))
    with pytest.raises(IntegrityError, match="of another bundle"):
        verify_bundle(bundle, [pair.public])
    with pytest.raises(IntegrityError, match="of another bundle"):  # found without any key
        unchecked([signed(older, pair)], index_digest=bundle.digest)


def test_an_index_with_one_variant_swapped(
    bundle: Bundle, pair: KeyPair, tmp_path: Path, sources: Path, make_content: MakeContent
) -> None:
    """Same name, same version, another engine for one target: well-formed, and not what was signed."""
    document = signed(bundle, pair)
    (sources / "t4.engine").write_bytes(b"a backdoor")
    swapped = open_bundle(write_bundle(tmp_path / "swapped", make_content()).path)
    assert verify_integrity(swapped.path).digest != bundle.digest
    add_signature(swapped.path, document)
    with pytest.raises(IntegrityError, match=r"of another bundle.*swapped"):
        verify_bundle(swapped, [pair.public])


def test_a_manifest_that_was_not_signed(bundle: Bundle, pair: KeyPair) -> None:
    with pytest.raises(IntegrityError, match=r"not among what was signed.*sha256:ffff"):
        trust(bundle, [signed(bundle, pair)], pair, manifests=[bundle.variants[0].digest, "sha256:" + "f" * 64])


def with_certificate(value: Any) -> None:
    value["verificationMaterial"] = {"certificate": {"rawBytes": "AA=="}}


@pytest.mark.parametrize(
    "change",
    [
        with_certificate,
        lambda value: value["verificationMaterial"].update(tlogEntries=[{"logIndex": "1"}]),
        lambda value: value.update(mediaType="application/vnd.dev.sigstore.bundle.v0.9+json"),
        lambda value: value["dsseEnvelope"].update(payloadType="text/plain"),
    ],
    ids=["certificate", "log", "version", "payload type"],
)
def test_documents_of_other_kinds_do_not_count(bundle: Bundle, pair: KeyPair, change: Callable[[Any], object]) -> None:
    foreign = altered(signed(bundle, pair), change)
    with pytest.raises(IntegrityError, match="is not signed by"):
        trust(bundle, [foreign], pair)
    assert trust(bundle, [foreign, signed(bundle, pair)], pair)
    assert unchecked([foreign], index_digest=bundle.digest) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b"[]",
        b"not JSON",
        b"[" * 100_000,
        canonical_json({"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://spdx.dev/Document"}),
    ],
    ids=["empty", "list", "text", "deep", "SBOM"],
)
def test_the_same_key_over_something_else(bundle: Bundle, pair: KeyPair, payload: bytes) -> None:
    with pytest.raises(IntegrityError, match="a statement by the key"):
        trust(bundle, [dsse.seal(payload, pair.key)], pair)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["subject"].pop(0),
        lambda value: value["subject"].append(value["subject"][0]),
        lambda value: value["subject"].append(value["subject"][1]),
        lambda value: value["subject"][0]["digest"].update(sha256="x" * 64),
        lambda value: value["predicate"]["buildDefinition"].update(buildType="https://example.com/other"),
        lambda value: value["predicate"]["buildDefinition"]["externalParameters"].update(version="9"),
        lambda value: value["predicate"]["buildDefinition"]["externalParameters"].update(version=["1.2.0"]),
    ],
)
def test_statements_that_contradict_themselves(bundle: Bundle, pair: KeyPair, change: Callable[[Any], object]) -> None:
    """Even signed by the right key: what cannot be read in one way only does not count."""
    value = json.loads(statement(bundle))
    change(value)
    with pytest.raises(IntegrityError, match="a statement by the key"):
        trust(bundle, [dsse.seal(canonical_json(value), pair.key)], pair)


@pytest.mark.parametrize(
    "document",
    [b"", b"{}", b"\xff", b"null", b"[" * 100_000, b'{"mediaType": 1}', b"9" * (5 << 20)],
    ids=["nothing", "empty", "binary", "null", "deep", "number", "huge"],
)
def test_garbage_is_bad_even_beside_a_good_one(bundle: Bundle, pair: KeyPair, document: bytes) -> None:
    with pytest.raises(IntegrityError, match="a signature is"):
        trust(bundle, [signed(bundle, pair), document], pair)
    with pytest.raises(IntegrityError, match="a signature is"):
        unchecked([document], index_digest=bundle.digest)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(extra=1),
        lambda value: value["dsseEnvelope"].update(extra=1),
        lambda value: value["dsseEnvelope"]["signatures"].append(value["dsseEnvelope"]["signatures"][0]),
        lambda value: value["dsseEnvelope"]["signatures"][0].update(sig=""),
        lambda value: value["dsseEnvelope"].update(payload=value["dsseEnvelope"]["payload"] + "\n"),
        lambda value: value["verificationMaterial"]["publicKey"].update(hint=7),
    ],
)
def test_documents_that_say_more_or_less(bundle: Bundle, pair: KeyPair, change: Callable[[Any], object]) -> None:
    with pytest.raises(IntegrityError, match="a signature"):
        trust(bundle, [altered(signed(bundle, pair), change)], pair)


def test_no_key_is_named_twice(bundle: Bundle, pair: KeyPair) -> None:
    document = signed(bundle, pair).replace(b'"payloadType":', b'"payload":"AAAA","payloadType":', 1)
    with pytest.raises(IntegrityError, match="is not JSON"):
        trust(bundle, [document], pair)


def test_too_many(bundle: Bundle, pair: KeyPair) -> None:
    with pytest.raises(IntegrityError, match="65 signatures"):
        trust(bundle, [signed(bundle, pair)] * 65, pair)


# -- no byte may change


class _Once:
    """One bundle and its document for all examples; hypothesis does not renew fixtures between examples."""

    def __init__(self, bundle: Bundle, older: Bundle, pair: KeyPair) -> None:
        self.bundle, self.pair = bundle, pair
        self.document = signed(bundle, pair)
        self.older_document = signed(older, pair)


@pytest.fixture
def once(bundle: Bundle, older: Bundle, pair: KeyPair) -> _Once:
    return _Once(bundle, older, pair)


def test_any_flipped_byte_is_refused(once: _Once) -> None:
    assert trust(once.bundle, [once.document], once.pair)

    @settings(max_examples=500, deadline=None)
    @given(at=st.integers(0, len(once.document) - 1), flip=st.integers(1, 255))
    def run(at: int, flip: int) -> None:
        document = bytearray(once.document)
        document[at] ^= flip
        with pytest.raises(IntegrityError):
            trust(once.bundle, [bytes(document)], once.pair)

    run()


def test_every_byte_outside_the_payload_counts(once: _Once) -> None:
    """All of them, each changed to its neighbour and to the other case: base64 and JSON leave no room."""
    start = once.document.index(b'"payload":"') + 11
    end = once.document.index(b'"', start)
    for at in (*range(start), *range(end - 8, len(once.document))):
        for flip in (0x01, 0x20):
            document = bytearray(once.document)
            document[at] ^= flip
            with pytest.raises(IntegrityError):
                trust(once.bundle, [bytes(document)], once.pair)


def test_base64_has_one_spelling(once: _Once) -> None:
    """The last character before the padding has bits that decoders drop."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    documents = [dsse.seal(statement(once.bundle, builder="urn:" + "x" * n), once.pair.key) for n in (1, 2, 3)]
    padded = [document for document in documents if json.loads(document)["dsseEnvelope"]["payload"].endswith("=")]
    assert len(padded) == 2
    for document in padded:
        assert trust(once.bundle, [document], once.pair)
        value = json.loads(document)
        payload = value["dsseEnvelope"]["payload"]
        last = payload.rstrip("=")[-1]
        other = letters[letters.index(last) + 1].join(payload.rsplit(last, 1))
        assert base64.b64decode(other) == base64.b64decode(payload)
        value["dsseEnvelope"]["payload"] = other
        with pytest.raises(IntegrityError, match="payload is not base64"):
            trust(once.bundle, [canonical_json(value)], once.pair)


def test_parts_of_two_documents_never_fit(once: _Once) -> None:
    """Each piece of one bundle's document put into the other's: only the whole of its own holds."""
    own, other = json.loads(once.document), json.loads(once.older_document)
    for donor, host in ((own, other), (other, own)):
        for payload in (True, False):
            mixed = json.loads(json.dumps(host))
            if payload:
                mixed["dsseEnvelope"]["payload"] = donor["dsseEnvelope"]["payload"]
            else:
                mixed["dsseEnvelope"]["signatures"] = donor["dsseEnvelope"]["signatures"]
            with pytest.raises(IntegrityError):
                trust(once.bundle, [canonical_json(mixed)], once.pair)


def test_a_document_spelled_with_spaces_is_the_same(once: _Once) -> None:
    """JSON is not what is signed: another tool may lay it out anew."""
    assert trust(once.bundle, [json.dumps(json.loads(once.document), indent=2).encode()], once.pair)


def test_key_id_may_be_left_out(once: _Once) -> None:
    """As cosign does; the hint still names the key."""
    bare = altered(once.document, lambda value: value["dsseEnvelope"]["signatures"][0].pop("keyid"))
    assert trust(once.bundle, [bare], once.pair)


# -- the folder


def test_signing_again(bundle: Bundle, pair: KeyPair, other_pair: KeyPair) -> None:
    first = sign(bundle.path, pair.key)
    document = first.path.read_bytes()
    again = sign(bundle.path, pair.key)
    assert again.unchanged
    assert first.path.read_bytes() == document
    with pytest.raises(InputError, match="another statement"):
        sign(bundle.path, pair.key, builder="urn:other")
    assert not sign(bundle.path, pair.key, builder="urn:other", force=True).unchanged
    assert verify_bundle(bundle, [pair.public]).statement.builder == "urn:other"
    sign(bundle.path, other_pair.key)
    assert len(signatures(bundle.path)) == 2


@pytest.mark.parametrize("standing", ["another bundle's", "damaged", "by another key"])
def test_what_stands_under_the_keys_name_and_is_not_its_signature_is_replaced(
    bundle: Bundle, older: Bundle, pair: KeyPair, other_pair: KeyPair, standing: str
) -> None:
    target = sign(bundle.path, pair.key).path
    documents = {
        "another bundle's": signed(older, pair), "damaged": b"{", "by another key": signed(bundle, other_pair)
    }  # fmt: skip
    target.write_bytes(documents[standing])
    assert not sign(bundle.path, pair.key).unchanged
    assert verify_bundle(bundle, [pair.public])


def test_a_damaged_bundle_is_not_signed(bundle: Bundle, pair: KeyPair) -> None:
    engine = bundle.file(bundle.select("t4")[0], "main.engine")
    engine.chmod(0o644)
    data = bytearray(engine.read_bytes())
    data[100] ^= 1
    engine.write_bytes(data)
    with pytest.raises(IntegrityError, match="the bundle is damaged"):
        sign(bundle.path, pair.key)
    assert not (bundle.path / "signatures").exists()


def test_rebuilding_the_same_bundle_keeps_its_signatures(
    bundle: Bundle, pair: KeyPair, make_content: MakeContent
) -> None:
    sign(bundle.path, pair.key)
    assert write_bundle(bundle.path, make_content()).unchanged
    assert verify_bundle(bundle, [pair.public])
    engine = bundle.file(bundle.select("t4")[0], "main.engine")
    engine.unlink()
    assert not write_bundle(bundle.path, make_content()).unchanged  # mended
    assert verify_bundle(open_bundle(bundle.path), [pair.public])


def test_another_bundle_in_its_place_has_no_signature(
    bundle: Bundle, pair: KeyPair, sources: Path, make_content: MakeContent
) -> None:
    sign(bundle.path, pair.key)
    (sources / "t4.engine").write_bytes(b"a later engine")
    write_bundle(bundle.path, make_content(), force=True)
    assert signatures(bundle.path) == []


def test_other_files_among_signatures_are_told(bundle: Bundle, pair: KeyPair, make_content: MakeContent) -> None:
    sign(bundle.path, pair.key)
    (bundle.path / "signatures" / "notes.txt").write_text("mine")
    (bundle.path / "signatures" / "folder.sigstore.json").mkdir()
    assert verify_integrity(bundle.path).strays == ("signatures/folder.sigstore.json", "signatures/notes.txt")
    assert verify_bundle(bundle, [pair.public])
    bundle.file(bundle.select("t4")[0], "main.engine").unlink()
    with pytest.raises(InputError, match=r"signatures/notes\.txt"):
        write_bundle(bundle.path, make_content(), force=True)


def test_links_are_not_followed(bundle: Bundle, older: Bundle, pair: KeyPair) -> None:
    sign(older.path, pair.key)
    (bundle.path / "signatures").symlink_to(older.path / "signatures")
    assert verify_integrity(bundle.path).strays == ("signatures",)
    with pytest.raises(IntegrityError, match="symbolic link"):
        signatures(bundle.path)
    with pytest.raises((InputError, IntegrityError)):
        sign(bundle.path, pair.key)
    (bundle.path / "signatures").unlink()
    sign(bundle.path, pair.key)
    (file,) = (bundle.path / "signatures").iterdir()
    shutil.move(file, bundle.path.parent / "elsewhere.json")
    file.symlink_to(bundle.path.parent / "elsewhere.json")
    assert signatures(bundle.path) == []
    assert verify_integrity(bundle.path).strays == (f"signatures/{file.name}",)


def test_signatures_from_elsewhere(bundle: Bundle, pair: KeyPair) -> None:
    document = signed(bundle, pair)
    path = add_signature(bundle.path, document)
    assert path == sign(bundle.path, pair.key).path
    foreign = altered(document, lambda value: value["verificationMaterial"].update(tlogEntries=[1]))
    assert add_signature(bundle.path, foreign) != path
    with pytest.raises(IntegrityError):
        add_signature(bundle.path, b"garbage")
    weird = altered(document, lambda value: value["verificationMaterial"]["publicKey"].update(hint="../../x"))
    assert add_signature(bundle.path, weird).parent == path.parent
    assert verify_integrity(bundle.path).strays == ()


def test_the_payload_reads_back(bundle: Bundle) -> None:
    said = read_statement(statement(bundle))
    assert (said.name, said.version, said.index) == (bundle.name, bundle.version, bundle.digest)
    assert set(said.variants.values()) == {variant.digest for variant in bundle.variants}

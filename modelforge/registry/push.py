"""Pushing: blobs, the variants' manifests, the signatures, then the index; whoever sees the version sees all of it.

A version tag is a promise: one that leads elsewhere is not moved unless forced. Registries cannot hold that promise
themselves (``If-None-Match`` is not honoured), so it is checked before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modelforge.bundle import checked, signing
from modelforge.bundle import format as words
from modelforge.bundle.read import Bundle, open_bundle
from modelforge.errors import InputError, RegistryError
from modelforge.registry.cache import Share, uploads
from modelforge.registry.client import Client, Document, fallback_tag
from modelforge.registry.pull import Reporter, Silent, run_all
from modelforge.registry.reference import TAG, Reference
from modelforge.registry.source import SIGNATURE_TYPE
from modelforge.registry.upload import Notes, upload
from modelforge.store import Store, digest_bytes

_UNUSABLE = ("skipped", "failed")
_RACES = 5


@dataclass(frozen=True)
class Pushed:
    """What a push did. ``sent`` and ``present`` in bytes: uploaded, and already in the registry (mounted ones too).

    Attributes:
        tags: digest by tag, the version's first.
        untagged: variants that have no tag of their own: nothing to run, or several of one target and stage.
    """

    reference: str
    name: str
    version: str
    digest: str
    tags: dict[str, str]
    untagged: tuple[str, ...]
    sent: int
    present: int
    signatures: int


def push(
    path: Path,
    reference: Reference,
    client: Client,
    *,
    force: bool = False,
    mount_from: str | None = None,
    store: Store | None = None,
    reporter: Reporter | None = None,
) -> Pushed:
    """Push a bundle: under its version, and each variant under ``VERSION-TARGET[-STAGE]`` for generic clients.

    Args:
        reference: where; without a tag, or with the bundle's version as its tag.
        force: move tags that lead elsewhere.
        mount_from: another repository of this registry, which may have the blobs.

    Raises:
        InputError: it cannot be pushed so. IntegrityError: the bundle is damaged. RegistryError: the registry refuses,
            or a tag leads elsewhere.
    """
    bundle = open_bundle(path)
    _check_reference(bundle, reference)
    tags, untagged = _tags(bundle)
    if not force:
        _check_tags(client, tags)
    share = Share()
    _send_blobs(bundle, client, mount_from, store or Store(), share, reporter or Silent())
    for digest in bundle.manifests:
        if client.digest_of(digest) is None:
            client.put_manifest(digest, _document(bundle, digest, words.MANIFEST_TYPE))
    index = _document(bundle, bundle.digest, words.INDEX_TYPE)
    documents = [document for _, document in signing.signatures(path)]
    # Before the tag: nobody sees the version without its signatures.
    for document in documents:
        attach(client, index, document, store or Store())
    for tag, digest in tags.items():
        kind = words.INDEX_TYPE if digest == bundle.digest else words.MANIFEST_TYPE
        _tag(client, tag, _document(bundle, digest, kind), force=force)
    return Pushed(
        reference.name, bundle.name, bundle.version, bundle.digest, tags, untagged, share.fetched, share.reused,
        len(documents),
    )  # fmt: skip


def attach(client: Client, subject: Document, signature: bytes, store: Store) -> None:
    """Put a Sigstore bundle beside an index, as a referrer; by the fallback tag where the registry has no such API.

    Form: sigstore/cosign specs/BUNDLE_SPEC.md; distribution-spec 1.1, "Pushing Manifests with Subject".
    """
    notes = Notes(uploads(store))
    layer = digest_bytes(signature)
    empty = digest_bytes(words.EMPTY_JSON)
    for digest, data in ((empty, words.EMPTY_JSON), (layer, signature)):
        if not client.has_blob(digest):
            upload(client, digest, len(data), data, notes=notes)
    manifest = {
        "schemaVersion": 2,
        "mediaType": words.MANIFEST_TYPE,
        "artifactType": SIGNATURE_TYPE,
        "config": words.descriptor(words.EMPTY_TYPE, empty, len(words.EMPTY_JSON)),
        "layers": [words.descriptor(SIGNATURE_TYPE, layer, len(signature))],
        "subject": words.descriptor(subject.media_type, subject.digest, len(subject.data)),
    }
    data = words.go_json(manifest)
    document = Document(words.MANIFEST_TYPE, digest_bytes(data), data)
    if not client.put_manifest(document.digest, document):
        _note_referrer(client, subject.digest, document)


def retag(client: Client, reference: Reference, tag: str, *, force: bool = False) -> str:
    """Give what a reference leads to another tag; gives its digest.

    Raises:
        InputError: there is no such thing, or the tag is none.
        RegistryError: the tag leads elsewhere, and no ``force``.
    """
    if not TAG.match(tag):
        raise InputError(f'"{tag}" cannot be a tag: letters, digits and . _ - only, at most 128')
    document = client.manifest(reference.digest or reference.tag or "")
    if document is None:
        raise InputError("there is no such tag", where=str(reference), fix=f"modelforge ls {reference.name}")
    if not force:
        _check_tags(client, {tag: document.digest})
    _tag(client, tag, document, force=force)
    return document.digest


def _check_reference(bundle: Bundle, reference: Reference) -> None:
    if bundle.is_checkout:
        raise InputError(
            "was pulled, and holds a part of the bundle only", where=str(bundle.path), fix="pull it with --all"
        )
    if reference.digest or reference.wanted or reference.tag not in (None, bundle.version):
        raise InputError(
            f"the bundle is version {bundle.version}; it is pushed under that tag",
            where=str(reference),
            fix=f"push to {reference.name}, then `modelforge tag` for other names",
        )


def _tags(bundle: Bundle) -> tuple[dict[str, str], tuple[str, ...]]:
    """Digest by tag, and the variants that get none."""
    tags = {bundle.version: bundle.digest}
    untagged = []
    places = [(variant.record.target, variant.record.stage) for variant in bundle.variants]
    for variant, here in zip(bundle.variants, places, strict=True):
        target, stage = here
        tag = f"{bundle.version}-{target}" + ("" if stage == "main" else f"-{stage}")
        usable = variant.record.status not in _UNUSABLE and places.count(here) == 1 and TAG.match(tag)
        if usable and tag not in tags:
            tags[tag] = variant.digest
        else:
            untagged.append(f"{target}/{stage}")
    return tags, tuple(untagged)


def _check_tags(client: Client, tags: dict[str, str]) -> None:
    for tag, digest in tags.items():
        standing = client.digest_of(tag)
        if standing not in (None, digest):
            raise RegistryError(
                f"the tag {tag} stands for something else: {standing}; this is {digest}",
                where=client.where,
                fix="raise the version in the recipe, or move the tag with --force",
            )


def _tag(client: Client, tag: str, document: Document, *, force: bool) -> None:
    standing = client.digest_of(tag)
    if standing == document.digest:
        return
    if standing is not None and not force:
        _check_tags(client, {tag: document.digest})  # another push came in between
    client.put_manifest(tag, document)
    if client.digest_of(tag) != document.digest:
        raise RegistryError(f"another push has taken the tag {tag}", where=client.where, fix="look which one is right")


def _send_blobs(
    bundle: Bundle, client: Client, mount_from: str | None, store: Store, share: Share, reporter: Reporter
) -> None:
    notes = Notes(uploads(store))
    documents = {bundle.digest, *bundle.manifests}

    def send(digest: str, size: int) -> None:
        name = digest[7:19]
        told = reporter.begin(name, size)
        sent = 0
        if not client.has_blob(digest):
            file = bundle.path / words.blob_name(digest)
            sent = upload(client, digest, size, file, notes=notes, mount_from=mount_from, told=told)
        share.fetch(sent)
        share.reuse(max(size - sent, 0))
        reporter.end(name)

    blobs = [(digest, size) for digest, size in bundle.blobs.items() if digest not in documents]
    tasks: list[Callable[[], None]] = [partial(send, digest, size) for digest, size in blobs]
    run_all(client.transport.limits.jobs, tasks, client.transport.stop)


def _document(bundle: Bundle, digest: str, media_type: str) -> Document:
    return Document(media_type, digest, checked.read_bytes(bundle.path, digest, bundle.blobs[digest]))


def _note_referrer(client: Client, subject: str, document: Document) -> None:
    """Add a referrer to the index under the fallback tag. The tag is read again after it was written: of several
    writers at once one wins, and the others add theirs to it."""
    entry = {
        **words.descriptor(document.media_type, document.digest, len(document.data)),
        "artifactType": SIGNATURE_TYPE,
    }
    for _ in range(_RACES):
        standing = client.manifest(fallback_tag(subject))
        entries = client.entries(standing) if standing is not None else []
        if any(each.get("digest") == document.digest for each in entries):
            return
        index = {"schemaVersion": 2, "mediaType": words.INDEX_TYPE, "manifests": [*entries, entry]}
        data = words.go_json(index)
        client.put_manifest(fallback_tag(subject), Document(words.INDEX_TYPE, digest_bytes(data), data))
    standing = client.manifest(fallback_tag(subject))
    if standing is None or all(each.get("digest") != document.digest for each in client.entries(standing)):
        raise RegistryError("the signature could not be listed beside the bundle", where=client.where, fix="push again")

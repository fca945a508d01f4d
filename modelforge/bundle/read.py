"""Bundles that exist: open, look into, choose from, check, take files out of.

A bundle comes from outside: nothing in it is believed before its digest and its bounds were checked, no name in it
leads out of its folder, and nothing of it is ever run here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.bundle import checked, parts
from modelforge.bundle import format as words
from modelforge.bundle.record import VariantRecord
from modelforge.errors import InputError, IntegrityError, nearest


@dataclass(frozen=True)
class FileEntry:
    """A file in a bundle; ``digest`` is ``sha256:<hex>``, ``role`` one of ``format.ROLES``, or a later one."""

    digest: str
    size: int
    media_type: str
    role: str


@dataclass(frozen=True)
class Variant:
    """One variant: its record, the digest of its manifest, and its files by title."""

    record: VariantRecord
    digest: str
    files: Mapping[str, FileEntry]


@dataclass(frozen=True)
class Bundle:
    """One bundle that was opened: all blobs are there with their sizes, all JSON has its digest.

    Attributes:
        digest: digest of the image index: the bundle's identity.
        about: what holds for all variants (serving, model, recipe ...), JSON.
        files: files that belong to no variant, by title.
        manifests: digests of all manifests, in the order of the index.
        blobs: size by digest of all that the bundle holds, index and manifests included.
    """

    path: Path
    name: str
    version: str
    digest: str
    about: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    variants: tuple[Variant, ...]
    manifests: tuple[str, ...]
    blobs: Mapping[str, int]

    def summary(self) -> dict[str, Any]:
        """The JSON of ``inspect --json``: the contract's keys first, then what ``about`` holds."""
        head = {
            "schema": words.SCHEMA,
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "path": str(self.path),
            "variants": [variant.record.to_json() for variant in self.variants],
        }
        return head | {key: value for key, value in self.about.items() if key not in head}

    def select(self, target: str, stage: str | None = None) -> tuple[Variant, ...]:
        """The variants of a target: one per stage and batch set, in the order of the index.

        Raises:
            InputError: there is none; says which there are.
        """
        of_target = [variant for variant in self.variants if variant.record.target == target]
        if not of_target:
            known = {variant.record.target for variant in self.variants}
            raise InputError(
                f'has no variant for the target "{target}"; {nearest(target, known)}', where=str(self.path)
            )
        found = tuple(variant for variant in of_target if stage is None or variant.record.stage == stage)
        if not found:
            known = {variant.record.stage for variant in of_target}
            raise InputError(f'"{target}" has no stage "{stage}"; {nearest(str(stage), known)}', where=str(self.path))
        return found

    def file(self, variant: Variant | None, name: str) -> Path:
        """Where the blob of a variant's file lies (of one of the bundle's own files, for None).

        Raises:
            InputError: there is no such file; says which there are.
        """
        files = self.files if variant is None else variant.files
        if name not in files:
            raise InputError(f'there is no file "{name}"; {nearest(name, files)}', where=str(self.path))
        return self.path / words.blob_name(files[name].digest)


@dataclass(frozen=True)
class Report:
    """What :func:`verify_integrity` found in a sound bundle.

    Attributes:
        blobs, size: how many blobs were hashed, and their bytes.
        unreferenced: blobs, whole by their names, that nothing in the bundle leads to.
        strays: other files in the bundle's folder, relative to it. They are not part of the bundle.
    """

    digest: str
    blobs: int
    size: int
    unreferenced: tuple[str, ...]
    strays: tuple[str, ...]


def open_bundle(path: Path) -> Bundle:
    """Open a bundle. Hashes the index, manifests and records; of all other blobs it checks that they are there
    with their sizes (:func:`verify_integrity` hashes them too).

    Raises:
        InputError: not a bundle, or one of a later format.
        IntegrityError: damaged.
    """
    top = _read_top(path)
    index, name, version = _read_index(path, top)
    blobs = {top.digest: top.size}
    abouts: list[tuple[Mapping[str, Any], Mapping[str, FileEntry]]] = []
    variants: list[Variant] = []
    entries = [checked.descriptor(entry, path) for entry in checked.json_list(index.get("manifests"), path, "index")]
    for entry in entries:
        manifest = _read_manifest(path, entry)
        for part in (entry, *manifest.blobs):
            if blobs.setdefault(part.digest, part.size) != part.size:
                raise checked.damaged(f"the blob {part.digest} is said to have two sizes", path)
        kind = manifest.config.media_type
        if kind == words.VARIANT_TYPE:
            variants.append(_variant(path, entry, manifest))
        elif kind == words.ABOUT_TYPE:
            abouts.append((_about(path, manifest, name, version), manifest.files))
        elif kind.startswith("application/vnd.modelforge."):
            raise checked.newer(path, kind)
    if len(abouts) != 1:
        raise checked.damaged(f"the index says {len(abouts)} times what the bundle is about", path)
    for digest, size in blobs.items():
        checked.check_there(path, digest, size)
    ((about, files),) = abouts
    manifests = tuple(entry.digest for entry in entries)
    return Bundle(path, name, version, top.digest, about, files, tuple(variants), manifests, blobs)


def verify_integrity(path: Path) -> Report:
    """Hash every blob again, also those that nothing leads to.

    Raises:
        InputError: not a bundle, or one of a later format.
        IntegrityError: damaged; lists every blob that is missing or is not what its name says.
    """
    faults: list[str] = []
    bundle: Bundle | None = None
    try:
        bundle = open_bundle(path)
    except IntegrityError as error:
        faults.append(str(error.what) if error.where == str(path) else f"{error.where}: {error.what}")
    hashed: dict[str, int] = {}
    strays = sorted(set(os.listdir(path)) - words.MEMBERS)
    for file in sorted((path / words.BLOBS).rglob("*")):
        inside = file.relative_to(path).as_posix()
        digest = f"sha256:{file.name}"
        if inside == f"{words.BLOBS}/sha256" and file.is_dir():
            continue
        if inside != words.blob_name(digest) or not words.is_digest(digest):
            strays.append(inside)
        elif fault := checked.content_fault(file):
            faults.append(f"{inside}: {fault}")
        else:
            hashed[digest] = file.stat().st_size
    if faults or bundle is None:
        listed = "\n  ".join(dict.fromkeys(faults))
        raise IntegrityError(f"the bundle is damaged:\n  {listed}", where=str(path), fix=checked.AGAIN)
    unreferenced = tuple(digest for digest in hashed if digest not in bundle.blobs)
    return Report(bundle.digest, len(hashed), sum(hashed.values()), unreferenced, tuple(strays))


def export_files(
    bundle: Bundle, variant: Variant | None, folder: Path, *, roles: Collection[str] | None = None
) -> dict[str, Path]:
    """Copy the files of a variant (the bundle's own, for None) into a folder under their titles, hashing each on
    its way; files of the same names there are replaced. Copies, never links: onnx refuses linked external data.

    Args:
        roles: only files of these roles.

    Returns:
        path by title.

    Raises:
        IntegrityError: a blob is damaged; then nothing was put into the folder.
        InputError, BuildError: the folder cannot be written; no space.
    """
    files = bundle.files if variant is None else variant.files
    wanted = {title: entry for title, entry in files.items() if roles is None or entry.role in roles}
    with parts.writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with parts.part_folder(folder) as part:
            for title, entry in wanted.items():
                checked.check_there(bundle.path, entry.digest, entry.size)
                source = bundle.path / words.blob_name(entry.digest)
                parts.copy_file(source, part / title, entry.digest, entry.size, mode=0o666)
            for title in wanted:
                if (folder / title).is_dir() and not (folder / title).is_symlink():
                    raise InputError("a folder stands where a file belongs", where=str(folder / title))
            for title in wanted:
                os.replace(part / title, folder / title)
            parts.sync_folder(folder)
    return {title: folder / title for title in wanted}


def recorded_digest(path: Path) -> str | None:
    """The digest that the ``index.json`` of a perhaps damaged bundle names; None where ModelForge wrote no bundle."""
    try:
        (entry,) = json.loads(checked.read_small(path, words.INDEX_FILE))["manifests"]
        digest = entry["digest"]
        return digest if words.is_digest(digest) and words.NAME in entry["annotations"] else None
    except (InputError, IntegrityError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


# -- the layers of the format, outermost first


@dataclass(frozen=True)
class _Manifest:
    config: checked.Descriptor
    config_data: bytes
    files: Mapping[str, FileEntry]
    blobs: tuple[checked.Descriptor, ...]


def _read_top(path: Path) -> checked.Descriptor:
    """The descriptor of the image index, as ``index.json`` gives it.

    ``index.json`` has no digest, so nothing may stand in it that is not checked against the index itself.
    """
    if not os.path.exists(path / words.LAYOUT_FILE):
        raise InputError(
            "is not a bundle", where=str(path), fix="a bundle is the folder NAME-VERSION that `modelforge build` writes"
        )
    if checked.json_object(checked.read_small(path, words.LAYOUT_FILE), path, words.LAYOUT_FILE) != {
        "imageLayoutVersion": "1.0.0"
    }:
        raise checked.damaged("is not the `oci-layout` file of version 1.0.0", path / words.LAYOUT_FILE)
    top = checked.json_object(checked.read_small(path, words.INDEX_FILE), path, words.INDEX_FILE)
    entries = checked.json_list(top.get("manifests"), path, words.INDEX_FILE)
    known = top.keys() <= {"schemaVersion", "mediaType", "manifests"}
    if not known or top.get("schemaVersion") != 2 or top.get("mediaType", words.INDEX_TYPE) != words.INDEX_TYPE:
        raise checked.damaged("is not an OCI image index", path / words.INDEX_FILE)
    if len(entries) != 1:
        raise InputError(f"holds {len(entries)} images; a bundle is one", where=str(path / words.INDEX_FILE))
    entry = checked.descriptor(entries[0], path)
    if entry.media_type == words.MANIFEST_TYPE:
        raise InputError(
            "holds one manifest, not a whole bundle", where=str(path), fix="copy bundles with `skopeo copy --all`"
        )
    if entry.media_type != words.INDEX_TYPE or not entries[0].keys() <= {"mediaType", "digest", "size", "annotations"}:
        raise checked.damaged("does not lead to an OCI image index", path / words.INDEX_FILE)
    return entry


def _read_index(path: Path, top: checked.Descriptor) -> tuple[dict[str, Any], str, str]:
    """The image index, and the name and version that it gives the bundle."""
    index = checked.read_json(path, top.digest, top.size)
    annotations = checked.strings(index.get("annotations", {}), path, "index annotations")
    if words.SCHEMA_KEY not in annotations:
        raise InputError(
            "is an OCI image layout, but not a bundle", where=str(path), fix="`modelforge build` makes one"
        )
    if annotations[words.SCHEMA_KEY] != str(words.SCHEMA):
        raise checked.newer(path, f"schema {annotations[words.SCHEMA_KEY]}")
    name, version = annotations.get(words.NAME, ""), annotations.get(words.VERSION, "")
    if not re.match(words.NAME_PATTERN, name) or not re.match(words.VERSION_PATTERN, version):
        raise checked.damaged("the index names no bundle and version", path)
    _check_labels(path, top.annotations, name, version)
    return index, name, version


def _check_labels(path: Path, labels: Mapping[str, str], name: str, version: str) -> None:
    """Other tools may leave the labels out; those that are there must tell the truth."""
    truth = {words.NAME: name, words.REF_NAME: version}
    for key, label in labels.items():
        if truth.get(key) != label:
            raise checked.damaged(
                f"labels the bundle {key}={label!r}, which it is not ({name} {version})", path / words.INDEX_FILE
            )


def _read_manifest(path: Path, entry: checked.Descriptor) -> _Manifest:
    if entry.media_type != words.MANIFEST_TYPE:
        raise checked.damaged(f"the index leads to something unknown: {entry.media_type}", path)
    manifest = checked.read_json(path, entry.digest, entry.size)
    config = checked.descriptor(manifest.get("config"), path)
    layers = [
        checked.descriptor(layer, path)
        for layer in checked.json_list(manifest.get("layers"), path, "layers of a manifest")
    ]
    files: dict[str, FileEntry] = {}
    for layer in layers:
        title = layer.annotations.get(words.TITLE)
        if title is None and layer.media_type == words.EMPTY_TYPE:
            continue
        if title is None or title in files:
            raise checked.damaged(f"a manifest has a file without a title, or twice the title {title!r}", path)
        files[title] = FileEntry(layer.digest, layer.size, layer.media_type, layer.annotations.get(words.ROLE, ""))
    if fault := words.titles_fault(files):
        raise checked.damaged(fault, path)
    return _Manifest(config, checked.read_bytes(path, config.digest, config.size), files, (config, *layers))


def _variant(path: Path, entry: checked.Descriptor, manifest: _Manifest) -> Variant:
    record = VariantRecord.from_bytes(manifest.config_data, where=str(path / words.blob_name(manifest.config.digest)))
    for key, value in words.variant_labels(record.to_json()).items():
        if entry.annotations.get(key, value) != value:
            raise checked.damaged(
                f"the index labels a variant {key}={entry.annotations[key]!r}, its record says {value!r}", path
            )
    if record.artifact is not None:
        file = manifest.files.get(record.artifact.file)
        if file is None or (file.digest, file.size) != (record.artifact.digest, record.artifact.size):
            raise checked.damaged(
                f"the artifact {record.artifact.file!r} of {record.target} is not in its manifest", path
            )
    return Variant(record, entry.digest, manifest.files)


def _about(path: Path, manifest: _Manifest, name: str, version: str) -> Mapping[str, Any]:
    about = checked.json_object(manifest.config_data, path, "about")
    if (about.get("schema"), about.get("name"), about.get("version")) != (words.SCHEMA, name, version):
        raise checked.damaged("the bundle's parts disagree about its name, version or schema", path)
    return {key: value for key, value in about.items() if key not in ("schema", "name", "version")}

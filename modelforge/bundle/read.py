"""Bundles that exist: open, look into, choose from, check, take files out of.

A bundle comes from outside: nothing in it is believed before its digest and its bounds were checked, no name in it
leads out of its folder, and nothing of it is ever run here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.bundle import checked, documents, parts
from modelforge.bundle import format as words
from modelforge.bundle.documents import FileEntry
from modelforge.bundle.members import signature_strays
from modelforge.bundle.record import VariantRecord
from modelforge.errors import InputError, IntegrityError, nearest

__all__ = [
    "CHECKOUT",
    "Bundle",
    "FileEntry",
    "Report",
    "Variant",
    "documents_folder",
    "export_files",
    "open_bundle",
    "place",
    "recorded_digest",
    "verify_integrity",
]

CHECKOUT = ".modelforge"
"""Where a pulled folder keeps the OCI documents; the files of its variants lie beside it, under their titles."""


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
        path: the folder: an OCI image layout, or a checkout (what `modelforge pull` writes).
        digest: digest of the image index: the bundle's identity.
        about: what holds for all variants (serving, model, recipe ...), JSON.
        files: files that belong to no variant, by title.
        manifests: digests of all manifests, in the order of the index.
        blobs: size by digest of all that the bundle holds, index and manifests included.
        absent: of a checkout: descriptors of the manifests that were not pulled.
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
    is_checkout: bool = False
    absent: tuple[checked.Descriptor, ...] = ()

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
        if self.absent:
            head["absent"] = [words.labels_json(entry.annotations) | {"digest": entry.digest} for entry in self.absent]
        return head | {key: value for key, value in self.about.items() if key not in head}

    def select(self, target: str, stage: str | None = None) -> tuple[Variant, ...]:
        """The variants of a target: one per stage and batch set, in the order of the index.

        Raises:
            InputError: there is none; says which there are.
        """
        of_target = [variant for variant in self.variants if variant.record.target == target]
        if not of_target:
            if any(entry.annotations.get(words.TARGET) == target for entry in self.absent):
                raise InputError(
                    f'the variant for "{target}" was not pulled', where=str(self.path), fix=f"pull --target {target}"
                )
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
        """Where a variant's file lies (one of the bundle's own files, for None).

        Raises:
            InputError: there is no such file; says which there are.
        """
        files = self.files if variant is None else variant.files
        if name not in files:
            raise InputError(f'there is no file "{name}"; {nearest(name, files)}', where=str(self.path))
        if not self.is_checkout:
            return self.path / words.blob_name(files[name].digest)
        if variant is None:
            raise InputError(
                f'the file "{name}" belongs to no variant and was not pulled', where=str(self.path), fix="pull --all"
            )
        return self.path / place(variant.record.target, variant.record.stage, name)

    def places(self) -> dict[Path, FileEntry]:
        """Every file of every variant that is here, by where it lies; a layout's blob stands once."""
        return {
            self.file(variant, title): entry for variant in self.variants for title, entry in variant.files.items()
        } | {self.file(None, title): entry for title, entry in self.files.items() if not self.is_checkout}


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
    """Open a bundle: a layout or a checkout. Hashes the index, manifests and records; of all other files it checks
    that they are there with their sizes (:func:`verify_integrity` hashes them too).

    Raises:
        InputError: not a bundle, or one of a later format.
        IntegrityError: damaged.
    """
    bundle = _read_documents(path)
    for digest, size in ({} if bundle.is_checkout else bundle.blobs).items():
        checked.check_there(path / words.blob_name(digest), size)
    for file, entry in bundle.places().items():
        checked.check_there(file, entry.size)
    return bundle


def verify_integrity(path: Path) -> Report:
    """Hash every blob again, also those that nothing leads to.

    Raises:
        InputError: not a bundle, or one of a later format.
        IntegrityError: damaged; lists every blob that is missing or is not what its digest says.
    """
    faults: list[str] = []
    bundle: Bundle | None = None
    try:
        bundle = open_bundle(path)
    except IntegrityError as error:
        faults.append(str(error.what) if error.where == str(path) else f"{error.where}: {error.what}")
    checking = _Hashing(path, faults)
    if os.path.lexists(path / CHECKOUT) and not os.path.lexists(path / words.LAYOUT_FILE):
        checking.checkout(bundle)
    else:
        checking.layout(path, words.MEMBERS)
    if faults or bundle is None:
        listed = "\n  ".join(dict.fromkeys(faults))
        raise IntegrityError(f"the bundle is damaged:\n  {listed}", where=str(path), fix=checked.AGAIN)
    unreferenced = tuple(digest for digest in checking.hashed if digest not in bundle.blobs)
    hashed = checking.hashed
    return Report(bundle.digest, len(hashed), sum(hashed.values()), unreferenced, tuple(sorted(checking.strays)))


class _Hashing:
    """Hashes what lies in a bundle's folder, and keeps what is wrong and what does not belong there."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        self.path = path
        self.faults = faults
        self.hashed: dict[str, int] = {}
        self.strays: list[str] = []

    def layout(self, root: Path, members: Collection[str]) -> None:
        self.strays += [self._inside(root / name) for name in set(os.listdir(root)) - set(members)]
        self.strays += [self._inside(root / name) for name in signature_strays(root)]
        for file in sorted((root / words.BLOBS).rglob("*")):
            inside = file.relative_to(root).as_posix()
            digest = f"sha256:{file.name}"
            if inside == f"{words.BLOBS}/sha256" and file.is_dir():
                continue
            if inside != words.blob_name(digest) or not words.is_digest(digest):
                self.strays.append(self._inside(file))
            else:
                self._hash(file, digest)

    def checkout(self, bundle: Bundle | None) -> None:
        self.layout(self.path / CHECKOUT, words.MEMBERS)
        places = {} if bundle is None else bundle.places()
        for file, entry in places.items():
            self._hash(file, entry.digest)
        folders = {folder for file in places for folder in file.parents}
        for folder, names, files in os.walk(self.path):
            here = Path(folder)
            if here == self.path:
                names.remove(CHECKOUT)
            # A link to a folder is no folder of ours; os.walk does not follow it.
            self.strays += [self._inside(here / name) for name in files if here / name not in places]
            self.strays += [
                self._inside(here / name) for name in names if here / name not in folders or (here / name).is_symlink()
            ]

    def _hash(self, file: Path, digest: str) -> None:
        if fault := checked.content_fault(file, digest):
            self.faults.append(f"{self._inside(file)}: {fault}")
        else:
            self.hashed[digest] = file.stat().st_size

    def _inside(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()


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
                source = bundle.file(variant, title)
                checked.check_there(source, entry.size)
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
        (entry,) = json.loads(checked.read_small(path / words.INDEX_FILE))["manifests"]
        digest = entry["digest"]
        return digest if words.is_digest(digest) and words.NAME in entry["annotations"] else None
    except (InputError, IntegrityError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def documents_folder(path: Path) -> Path:
    """Where the OCI documents of a bundle lie (and its ``signatures/``): the folder itself, or a checkout's own."""
    if not os.path.lexists(path / words.LAYOUT_FILE) and os.path.lexists(path / CHECKOUT):
        if (path / CHECKOUT).is_symlink():
            raise checked.damaged("is a symbolic link", path / CHECKOUT)
        return path / CHECKOUT
    return path


def place(target: str, stage: str, title: str) -> Path:
    """Where a file lies in a checkout: ``TARGET/TITLE``, ``TARGET/STAGE/TITLE`` when the stage is not ``main``."""
    return Path(target, title) if stage == "main" else Path(target, stage, title)


# -- from documents to a bundle


def _read_documents(path: Path) -> Bundle:
    root = documents_folder(path)
    top = _read_top(root)
    data = checked.read_bytes(root, top.digest, top.size)
    index = documents.read_index(data, path)
    documents.check_labels(top.annotations, index, root / words.INDEX_FILE)
    is_checkout = root != path
    present, absent = list(index.entries), []
    if is_checkout:
        present = [entry for entry in index.entries if os.path.lexists(root / words.blob_name(entry.digest))]
        absent = [entry for entry in index.entries if entry not in present]
    blobs = {top.digest: top.size}
    abouts: list[tuple[Mapping[str, Any], Mapping[str, FileEntry]]] = []
    variants: list[Variant] = []
    for entry in present:
        manifest = documents.read_manifest(checked.read_bytes(root, entry.digest, entry.size), path)
        config = checked.read_bytes(root, manifest.config.digest, manifest.config.size)
        of_variant = manifest.kind == words.VARIANT_TYPE
        for part in (entry, *(manifest.blobs if of_variant or not is_checkout else (manifest.config,))):
            if blobs.setdefault(part.digest, part.size) != part.size:
                raise checked.damaged(f"the blob {part.digest} is said to have two sizes", path)
        if of_variant:
            where = root / words.blob_name(manifest.config.digest)
            record = documents.read_record(config, entry, manifest, where)
            variants.append(Variant(record, entry.digest, manifest.files))
        elif manifest.kind == words.ABOUT_TYPE:
            abouts.append((documents.read_about(config, index, path), manifest.files))
    if len(abouts) != 1:
        raise checked.damaged(f"the index says {len(abouts)} times what the bundle is about", path)
    if is_checkout and (fault := places_fault(variants)):
        raise checked.damaged(fault, path)
    ((about, files),) = abouts
    manifests = tuple(entry.digest for entry in index.entries)
    return Bundle(
        path, index.name, index.version, top.digest, about, files, tuple(variants), manifests, blobs,
        is_checkout, tuple(absent),
    )  # fmt: skip


def places_fault(variants: Sequence[Variant]) -> str | None:
    """Why the files of these variants cannot lie in one checkout, or None."""
    folders: dict[str, list[str]] = {}
    for variant in variants:
        record = variant.record
        if fault := words.title_fault(record.stage) or words.title_fault(record.target):
            return f"{record.target}/{record.stage} cannot be a folder: it {fault}"
        inside = variant.files if record.stage == "main" else (record.stage,)
        folders.setdefault(record.target, []).extend(inside)
    for target, names in folders.items():
        if fault := words.titles_fault(names):
            return f"the files of {target} cannot lie in one folder: {fault}"
    return words.titles_fault(folders)


def _read_top(root: Path) -> checked.Descriptor:
    if not os.path.lexists(root / words.LAYOUT_FILE):
        raise InputError(
            "is not a bundle", where=str(root), fix="a bundle is the folder NAME-VERSION that `modelforge build` writes"
        )
    layout = root / words.LAYOUT_FILE
    if checked.json_object(checked.read_small(layout), layout) != {"imageLayoutVersion": "1.0.0"}:
        raise checked.damaged("is not the `oci-layout` file of version 1.0.0", layout)
    return documents.read_top(checked.read_small(root / words.INDEX_FILE), root / words.INDEX_FILE)

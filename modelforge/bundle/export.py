"""A bundle's variants as plain files: a folder a variant, or a Triton model repository.

Every file is hashed as it is copied, and a folder appears whole or not at all. Copies, never links: onnx refuses
linked external data. A folder is replaced only if an export wrote it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelforge.bundle import checked, parts
from modelforge.bundle import format as words
from modelforge.bundle.read import Bundle, FileEntry, Variant
from modelforge.bundle.triton import Served, serve, unserved
from modelforge.errors import InputError, UnsupportedError

Format = Literal["dir", "triton"]
FORMATS: tuple[Format, ...] = ("dir", "triton")
MARKER = "modelforge-export.json"
"""Lies in every folder that an export wrote: where it came from, and the digest of each file."""


@dataclass(frozen=True)
class Exported:
    """``folders`` were written; ``files`` are theirs, by path relative to the folder that holds them."""

    folders: tuple[Path, ...]
    files: Mapping[str, FileEntry]
    notes: tuple[str, ...]


@dataclass
class _Folder:
    """A folder to be written, by relative path: files of the bundle, each with where it lies now, and texts."""

    name: str
    facts: dict[str, Any]
    files: dict[str, tuple[Path, FileEntry]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def default_output(bundle: Bundle, kind: Format) -> Path:
    return Path(f"{bundle.name}-{bundle.version}-files" if kind == "dir" else "model_repository")


def export_bundle(
    bundle: Bundle,
    output: Path,
    kind: Format,
    *,
    targets: Sequence[str] = (),
    lowered: bool = False,
    force: bool = False,
) -> Exported:
    """Write variants as plain files.

    ``dir`` writes the folder ``output``: ``TARGET/STAGE/`` with each file under its title, and ``record.json``.
    ``triton`` writes one model folder a stage into ``output``, which may hold other models.

    Args:
        targets: all for ``dir`` if empty; for ``triton`` the one that can be served.
        lowered: with ``triton``: the lowered ONNX model for ONNX Runtime, instead of the artifact.
        force: replace a folder that an export wrote.

    Raises:
        InputError: no such target; something stands there; it cannot be written there.
        UnsupportedError: Triton cannot serve it.
        IntegrityError: a blob is damaged; then nothing was written.
        BuildError: no space.
    """
    if output.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError("lies inside the bundle", where=str(output), fix="give another folder with -o")
    notes: list[str] = []
    if kind == "dir":
        if lowered:
            raise InputError("--lowered is for --format triton", fix="a `dir` export holds the lowered models anyway")
        root, folders = output.absolute().parent, [_plain(bundle, output.absolute().name, targets)]
    else:
        served = _served(bundle, targets, lowered=lowered)
        root, folders = output.absolute(), [_model(bundle, each) for each in served]
        notes = list(dict.fromkeys(note for each in served for note in each.notes))
    for folder in folders:
        _check_free(root / folder.name, force=force)
    with parts.writing_to(output):
        root.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            _write(folder, root, force=force)
    files = {f"{folder.name}/{name}": entry for folder in folders for name, (_, entry) in folder.files.items()}
    places = (output,) if kind == "dir" else tuple(output / folder.name for folder in folders)
    return Exported(places, files, tuple(notes))


# -- what goes where


def _plain(bundle: Bundle, name: str, targets: Sequence[str]) -> _Folder:
    chosen = [each for tag in dict.fromkeys(targets) for each in bundle.select(tag)] or list(bundle.variants)
    folder = _Folder(name, _facts(bundle, "dir", chosen), texts={"about.json": _json(bundle.about)})
    if not bundle.is_checkout:  # which holds files of variants only
        folder.files |= {title: (bundle.file(None, title), entry) for title, entry in bundle.files.items()}
    for variant in chosen:
        place = _place(bundle, variant)
        for title, entry in variant.files.items():
            folder.files[f"{place}/{title}"] = (bundle.file(variant, title), entry)
        folder.texts[f"{place}/record.json"] = _json(variant.record.to_json())
    return folder


def _place(bundle: Bundle, variant: Variant) -> str:
    """``TARGET/STAGE``, and the batch sizes where a stage has several variants."""
    record = variant.record
    if fault := words.title_fault(record.stage):
        raise InputError(f'the stage "{record.stage}" cannot name a folder: it {fault}', where=str(bundle.path))
    if len(bundle.select(record.target, record.stage)) == 1 or record.batch is None:
        return f"{record.target}/{record.stage}"
    sizes = record.batch.values or (record.batch.min, record.batch.max)
    return f"{record.target}/{record.stage}-batch-{'-'.join(map(str, sizes))}"


def _model(bundle: Bundle, served: Served) -> _Folder:
    facts = _facts(bundle, "triton", [served.variant]) | {
        "batching": None if served.batching is None else served.batching.to_json(),
        "notes": list(served.notes),
    }
    variant = served.variant
    files = {f"1/{name}": (bundle.file(variant, title), variant.files[title]) for title, name in served.files.items()}
    texts = {"config.pbtxt": served.config, "record.json": _json(variant.record.to_json())}
    return _Folder(served.name, facts, files, texts)


def _served(bundle: Bundle, targets: Sequence[str], *, lowered: bool) -> list[Served]:
    """The stages of one target: a repository serves one machine.

    Raises:
        UnsupportedError: none can be served. InputError: several can.
    """
    tags = list(dict.fromkeys(targets))
    if not tags:
        tags = list(
            dict.fromkeys(each.record.target for each in bundle.variants if not unserved(each, lowered=lowered))
        )
        if not tags:
            reasons = "".join(
                f"\n  {each.record.target}: {unserved(each, lowered=lowered)}" for each in bundle.variants
            )
            fix = "choose another bundle" if lowered else "--lowered --target TAG exports a lowered ONNX model"
            raise UnsupportedError(f"no variant can be served by Triton:{reasons}", where=str(bundle.path), fix=fix)
    if len(tags) > 1:
        raise InputError(
            f"variants for {', '.join(tags)} can be served, and a model repository is one machine's",
            where=str(bundle.path),
            fix=f"choose one: --target {tags[0]}",
        )
    variants = bundle.select(tags[0])
    served = [serve(bundle, variant, lowered=lowered) for variant in variants]
    if len({each.name for each in served}) < len(served):
        raise InputError(
            "several variants of one stage, for different batch sizes, would be one model",
            where=f"target {tags[0]}",
            fix="export with --format dir, and serve the one that you need",
        )
    return served


def _facts(bundle: Bundle, kind: Format, variants: Sequence[Variant]) -> dict[str, Any]:
    return {
        "schema": 1,
        "format": kind,
        "name": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "variants": [
            {"target": each.record.target, "stage": each.record.stage, "digest": each.digest} for each in variants
        ],
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


# -- writing


def _check_free(place: Path, *, force: bool) -> None:
    """Refuse to write where something stands that is not to be replaced.

    Raises:
        InputError: says what stands there.
    """
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not place.is_dir():
        raise InputError("is not a folder, and is not replaced", where=str(place), fix="give another place with -o")
    if not any(place.iterdir()):
        return
    if not (place / MARKER).is_file():
        raise InputError(
            "this folder was not written by `modelforge export`, and is not replaced",
            where=str(place),
            fix="give another place with -o, or move it away",
        )
    if not force:
        raise InputError("an export stands there", where=str(place), fix="replace it with --force, or give another -o")


def _write(folder: _Folder, root: Path, *, force: bool) -> None:
    with parts.part_folder(root) as part:
        for name, (source, entry) in folder.files.items():
            _make_parent(part, name)
            checked.check_there(source, entry.size)
            mode = 0o777 if entry.role == "runner" else 0o666
            parts.copy_file(source, part / name, entry.digest, entry.size, mode=mode)
        files = {
            name: {"digest": entry.digest, "size": entry.size} for name, (_, entry) in sorted(folder.files.items())
        }
        texts = folder.texts | {MARKER: _json(folder.facts | {"files": files})}
        for name, text in texts.items():
            _make_parent(part, name)
            parts.write_file(part / name, text.encode(), mode=0o666)
        for path in [part, *(each for each in part.rglob("*") if each.is_dir())]:
            parts.sync_folder(path)
        with parts.locked(root):
            # Again, under the lock: another export may have finished meanwhile.
            _check_free(root / folder.name, force=force)
            parts.put_in_place(part, root / folder.name)


def _make_parent(part: Path, name: str) -> None:
    (part / name).parent.mkdir(parents=True, exist_ok=True)

"""Pulling: choose by target tag, check the signature, then fetch what lacks and put it in place as plain files.

Nothing but JSON documents of bounded size is fetched before the signature was checked, and nothing appears at the
destination before every byte of it was held against its digest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from modelforge.bundle import checked, checkout, documents
from modelforge.bundle import format as words
from modelforge.bundle.checked import Descriptor
from modelforge.bundle.documents import Manifest
from modelforge.bundle.read import CHECKOUT, Bundle, Variant, place, places_fault
from modelforge.errors import BuildError, InputError, IntegrityError
from modelforge.registry.cache import Cache, Incoming, Share
from modelforge.registry.source import Found, Source
from modelforge.store import Blob, Store

if TYPE_CHECKING:
    from modelforge.bundle.match import Match
    from modelforge.bundle.signing import Verified

_UNUSABLE = ("skipped", "failed")
_DOCUMENTS_LIMIT = 64 << 20  # all manifests and records of one bundle, which are held in memory
_SPARE = 16 << 20  # bytes left free on a disk


@dataclass(frozen=True)
class Wanted:
    """What of a bundle: variants by target tag (or digest) and stage, or all of it as a layout."""

    targets: Sequence[str] = ()
    stage: str | None = None
    everything: bool = False


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        fetched: bytes that came from the registry; ``reused``: that the store had.
        unchanged: this very thing stood there already, whole.
        asked: the version that was asked for; another than ``version`` where a tag is an alias.
        verified: the signatures that were demanded, and hold.
        signatures: how many lie beside the bundle.
        checks: whether the variants can run on this device, by their names; empty where that was not asked for.
    """

    path: Path
    name: str
    version: str
    digest: str
    variants: tuple[Descriptor, ...]
    fetched: int
    reused: int
    unchanged: bool
    asked: str | None
    verified: tuple[Verified, ...]
    signatures: int
    checks: Mapping[str, Match] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "path": str(self.path),
            "variants": [{**words.labels_json(entry.annotations), "digest": entry.digest} for entry in self.variants],
            "fetched": self.fetched,
            "reused": self.reused,
            "unchanged": self.unchanged,
            "signatures": self.signatures,
            "signed_by": [{"key": str(each.key), "key_id": each.key_id} for each in self.verified],
        } | ({"check": {name: found.to_json() for name, found in self.checks.items()}} if self.checks else {})


class Reporter(Protocol):
    """Hears of progress, from several threads. ``begin`` gives what is called with the bytes that come."""

    def begin(self, name: str, size: int) -> Callable[[int], None]: ...
    def end(self, name: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def begin(self, name: str, size: int) -> Callable[[int], None]:
        return lambda _: None

    def end(self, name: str) -> None:
        pass


@dataclass
class _Chosen:
    """One manifest that is wanted, and what it leads to."""

    entry: Descriptor
    manifest: Manifest
    variant: Variant | None = None


@dataclass
class _Plan:
    found: Found
    chosen: list[_Chosen]
    about: Mapping[str, Any] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    places: dict[Path, Blob] = field(default_factory=dict)


def pull(
    source: Source,
    wanted: Wanted,
    destination: Path | None = None,
    *,
    keys: Sequence[Path] = (),
    check: bool = False,
    force: bool = False,
    store: Store | None = None,
    jobs: int = 4,
    reporter: Reporter | None = None,
) -> Pulled:
    """Pull a bundle, or variants of it.

    Args:
        destination: the folder; ``NAME-VERSION`` here if None.
        keys: public keys, one of which must have signed it. A policy of the user's own is asked for in any case.
        check: refuse, before anything is fetched, what is known not to run on this device.
        force: replace a bundle that stands there and was changed.

    Raises:
        InputError: no such target, or several; or it cannot run here; or the destination cannot be replaced.
        IntegrityError: a digest, a signature or the registry says no.
        BuildError: no space.
    """
    found = source.find()
    index = found.index
    entries = choose(found, wanted, source.where)
    signatures = source.signatures(found.document.digest)
    verified = _demand(found, entries, source, signatures, keys)
    plan = _plan(source, found, entries, layout=wanted.everything)
    checks = _check(plan, source.where) if check else {}
    target = Path(os.path.abspath(destination if destination is not None else f"{index.name}-{index.version}"))
    variants = tuple(entry for entry in entries if entry.annotations.get(words.KIND) == "variant")
    share = Share()
    unchanged = _is_it(checkout.standing(target, force=force), plan, layout=wanted.everything)
    if not unchanged:
        cache = Cache(store)
        _check_space(plan, cache, target)
        with checkout.replacing(target, force=force) as part:
            root = part if wanted.everything else checkout.checkout_root(part)
            _fetch(source, plan, part, cache, share, jobs, reporter or Silent(), layout=wanted.everything)
            checkout.write_documents(root, plan.documents, found.document.data, index.name, index.version)
            _keep_signatures(root, signatures)
        _record(cache, plan, source.where)
    else:
        _keep_signatures(target if wanted.everything else target / CHECKOUT, signatures)
        for each in plan.chosen:
            (store or Store()).touch(each.entry.digest.removeprefix("sha256:"))
    return Pulled(
        target, index.name, index.version, found.document.digest, variants, share.fetched, share.reused, unchanged,
        found.asked, verified, len(signatures), checks,
    )  # fmt: skip


def choose(found: Found, wanted: Wanted, where: str) -> list[Descriptor]:
    """The manifests that are wanted, "about" included, in the order of the index.

    Raises:
        InputError: a target fits none or several, or was not built; lists what there is.
    """
    entries = found.index.entries
    variants = [entry for entry in entries if entry.annotations.get(words.KIND) == "variant"]
    abouts = [entry for entry in entries if entry.annotations.get(words.KIND) == "about"]
    if len(variants) + len(abouts) != len(entries) or len(abouts) != 1:
        raise checked.damaged("the index does not label what it leads to", where)
    if wanted.everything:
        return list(entries)
    tags = list(dict.fromkeys(wanted.targets)) or _only_target(variants, where)
    picked = [entry for tag in tags for entry in _of_target(variants, tag, wanted.stage, where)]
    return [entry for entry in entries if entry in picked or entry in abouts]


def describe(entry: Descriptor) -> str:
    """A variant in a line: ``t4 (int8, compiled)``."""
    labels = words.labels_json(entry.annotations)
    stage = "" if labels["stage"] in (None, "main") else f"/{labels['stage']}"
    about = ", ".join(text for text in (labels["precision"], labels["status"]) if text)
    return f"{labels['target']}{stage} ({about})"


def _only_target(variants: Sequence[Descriptor], where: str) -> list[str]:
    targets = sorted({entry.annotations.get(words.TARGET, "") for entry in variants})
    if len(targets) != 1:
        raise InputError(f"which target? There are: {_listed(variants)}", where=where, fix="--target TAG, or --all")
    return targets


def _of_target(variants: Sequence[Descriptor], tag: str, stage: str | None, where: str) -> list[Descriptor]:
    if words.is_digest(tag):
        fitting = [entry for entry in variants if entry.digest == tag]
    else:
        fitting = [entry for entry in variants if entry.annotations.get(words.TARGET) == tag]
    if not fitting:
        raise InputError(f'has no variant for the target "{tag}"; there are: {_listed(variants)}', where=where)
    found = [entry for entry in fitting if stage in (None, entry.annotations.get(words.STAGE))]
    if not found:
        raise InputError(f'"{tag}" has no stage "{stage}"; there are: {_listed(fitting)}', where=where)
    stages = [entry.annotations.get(words.STAGE) for entry in found]
    if twice := [entry for entry in found if stages.count(entry.annotations.get(words.STAGE)) > 1]:
        listed = "\n  ".join(f"{describe(entry)}  {entry.digest}" for entry in twice)
        raise InputError(f'several variants fit "{tag}":\n  {listed}', where=where, fix="--target DIGEST takes one")
    for entry in found:
        if entry.annotations.get("io.modelforge.status") in _UNUSABLE:
            raise InputError(f"{describe(entry)}: there is nothing to run", where=where, fix=f"of {_listed(variants)}")
    return found


def _listed(variants: Sequence[Descriptor]) -> str:
    return ", ".join(describe(entry) for entry in variants) or "none"


def _demand(
    found: Found, entries: Sequence[Descriptor], source: Source, signatures: Sequence[bytes], keys: Sequence[Path]
) -> tuple[Verified, ...]:
    """Hold the bundle against the keys that were given, and against those that the user's policy demands."""
    from modelforge.bundle import policy, signing

    demands = [list(keys)] if keys else []
    if source.repository is not None:
        demanded = policy.policy_keys(source.repository)
        demands += [list(demanded)] if demanded is not None else []
    if not demands:
        signing.unchecked(signatures, index_digest=found.document.digest)  # what is bad under any key is bad here too
    return tuple(
        signing.require(
            signatures,
            each,
            index_digest=found.document.digest,
            name=found.index.name,
            version=found.asked or found.index.version,
            manifests=[entry.digest for entry in entries if entry.annotations.get(words.KIND) == "variant"],
        )
        for each in demands
    )


def _plan(source: Source, found: Found, entries: Sequence[Descriptor], *, layout: bool) -> _Plan:
    """Fetch the documents, hold them against each other, and say which file goes where."""
    plan = _Plan(found, [])
    for entry in entries:
        data = source.manifest(entry.digest, entry.size)
        manifest = documents.read_manifest(data, source.where)
        config = source.small_blob(manifest.config.digest, manifest.config.size)
        plan.documents |= {entry.digest: data, manifest.config.digest: config}
        if sum(map(len, plan.documents.values())) > _DOCUMENTS_LIMIT:
            raise checked.damaged(f"more than {_DOCUMENTS_LIMIT} bytes of manifests and records", source.where)
        each = _Chosen(entry, manifest)
        if manifest.kind == words.VARIANT_TYPE:
            record = documents.read_record(config, entry, manifest, source.where)
            if record.target != entry.annotations.get(words.TARGET):
                raise checked.damaged("a variant is not of the target that the index says", source.where)
            each.variant = Variant(record, entry.digest, manifest.files)
        elif manifest.kind == words.ABOUT_TYPE:
            plan.about = documents.read_about(config, found.index, source.where)
        plan.chosen.append(each)
    if layout:
        _plan_layout(plan, source.where)
    elif fault := places_fault([each.variant for each in plan.chosen if each.variant is not None]):
        raise checked.damaged(fault, source.where)
    for each in plan.chosen if not layout else ():
        if each.variant is not None:
            record = each.variant.record
            for title, file in each.variant.files.items():
                plan.places[place(record.target, record.stage, title)] = Blob(file.digest, file.size)
    return plan


def _check(plan: _Plan, where: str) -> Mapping[str, Match]:
    """Hold the variants against this device."""
    from modelforge.bundle import match

    variants = [each.variant for each in plan.chosen if each.variant is not None]
    checks = match.check(plan.about, variants)
    match.refuse_if_none_runs(checks, where)
    return checks


def _plan_layout(plan: _Plan, where: str) -> None:
    sizes: dict[str, int] = {}
    for each in plan.chosen:
        for blob in each.manifest.blobs:
            if sizes.setdefault(blob.digest, blob.size) != blob.size:
                raise checked.damaged(f"the blob {blob.digest} is said to have two sizes", where)
    for digest, size in sizes.items():
        if digest not in plan.documents:
            plan.places[Path(words.blob_name(digest))] = Blob(digest, size)


def _is_it(standing: Bundle | None, plan: _Plan, *, layout: bool) -> bool:
    """Whether what stands there, whole, is what was asked for."""
    if standing is None or standing.digest != plan.found.document.digest or standing.is_checkout == layout:
        return False
    return layout or {variant.digest for variant in standing.variants} == {
        each.entry.digest for each in plan.chosen if each.variant is not None
    }


def _fetch(
    source: Source, plan: _Plan, part: Path, cache: Cache, share: Share, jobs: int, reporter: Reporter, *, layout: bool
) -> None:
    wanted: dict[Blob, list[Path]] = defaultdict(list)
    for path, blob in plan.places.items():
        (part / path).parent.mkdir(parents=True, exist_ok=True)
        wanted[blob].append(part / path)

    def bring(blob: Blob, targets: list[Path]) -> None:
        told = reporter.begin(targets[0].name, blob.size)

        def heard(count: int) -> None:
            share.fetch(count)
            told(count)

        def download(incoming: Incoming) -> None:
            told(incoming.size)  # left by an earlier download
            source.download(blob.digest, blob.size, incoming, heard)

        if not cache.bring(blob, targets, download, mode=0o444 if layout else 0o666):
            share.reuse(blob.size)
        reporter.end(targets[0].name)

    run_all(jobs, [partial(bring, blob, targets) for blob, targets in wanted.items()], source.stop)


def run_all(jobs: int, tasks: Sequence[Callable[[], None]], stop: Callable[[], None]) -> None:
    """Run the tasks on threads. After the first error none is begun any more, those that run are told to ``stop``, and
    that error is raised."""
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            # As they end, not as they began: an error is heard at once.
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _check_space(plan: _Plan, cache: Cache, destination: Path) -> None:
    """Refuse before the download what the disks have no room for."""
    blobs = set(plan.places.values())
    lacking = sum(blob.size for blob in blobs if not cache.store.has(blob))
    output = sum(blob.size for blob in plan.places.values())
    needs: dict[int, list[int]] = {}
    for folder, size in ((cache.store.home, lacking), (destination.parent, output)):
        here = next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))
        device = here.stat().st_dev
        needs.setdefault(device, [shutil.disk_usage(here).free, 0])[1] += size
    for free, needed in needs.values():
        if needed and needed + _SPARE > free:
            raise BuildError(
                f"no space: {needed} bytes are needed (the store keeps a copy), {free} are free",
                where=str(destination),
                fix="free some (`modelforge prune`), give another folder with -o, or set MODELFORGE_HOME",
            )


def _record(cache: Cache, plan: _Plan, where: str) -> None:
    """Note in the store what was pulled, so that a prune goes by when it was last wanted."""
    for each in plan.chosen:
        if not each.manifest.files:
            continue
        files = {layer.digest: Blob(layer.digest, layer.size) for layer in each.manifest.files.values()}
        labels = words.labels_json(each.entry.annotations)
        cache.record(each.entry.digest, {"reference": where, **labels}, files)


def _keep_signatures(root: Path, found: Sequence[bytes]) -> None:
    """Put the signatures beside the documents, so that `verify --key` can be asked again later."""
    from modelforge.bundle.signing import add_signature

    for document in found:
        # One that is none was refused already where a signature is demanded; else it is nobody's loss.
        with contextlib.suppress(IntegrityError):
            add_signature(root, document)

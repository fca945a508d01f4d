"""One build: the child process, its timing cache, and engines that serve several targets and are built once."""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.engine_header import EngineHeader, read_header
from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.tensorrt.cuda import Gpu
from modelforge.compilers.tensorrt.device import environment
from modelforge.compilers.tensorrt.installation import Installed, call
from modelforge.compilers.tensorrt.product import Product
from modelforge.compilers.tensorrt.profiles import Profile, spell
from modelforge.compilers.tensorrt.switches import Switches
from modelforge.errors import BuildError, IntegrityError, UnsupportedError
from modelforge.store import StepRecord, Store, canonical_json, digest_bytes, digest_file, write_atomically

TIMING_CACHE = "timing.cache"
"""What a build measured, for the next one on such a GPU: beside the engine, and in the local cache."""

_ENGINE = "main.engine"
_WORKER = "modelforge.compilers.tensorrt.worker"
_SHARED = "tensorrt-engine"
"""The name of the step records of engines that several targets share."""


@dataclass(frozen=True)
class Built:
    """``version`` is what the toolchain calls itself, ``gpu`` what it was built on, None where that took none."""

    header: EngineHeader
    version: str
    gpu: str | None
    report: dict[str, Any]


def build(
    job: CompileJob, product: Product, installed: Installed, asked: Switches, ranges: list[Profile], gpu: Gpu | None
) -> Built:
    """Build ``main.engine`` into the job's folder.

    An engine for several compute capabilities is kept by what it was built from: the next target that asks for the same
    gets the same file, so that a bundle holds it once.

    Raises:
        BuildError: the builder failed, crashed, ran out of time or left no whole engine.
        UnsupportedError: it says that it cannot have this model for this GPU.
    """
    if len(asked.capabilities) == 1:
        return _build(job, product, installed, asked, ranges, gpu)
    store = Store()
    key = _shared_key(job, product, installed, asked, ranges)
    with store.lock(key):
        kept = store.read(key)
        if kept is not None:
            shutil.copyfile(store.blob_path(kept.files[_ENGINE].digest), job.workdir / _ENGINE)
            return _checked(job, product, kept.facts["version"], None, {**kept.facts["report"], "shared": True})
        built = _build(job, product, installed, asked, ranges, gpu)
        facts = {"version": built.version, "report": built.report}
        seconds = built.report["seconds"]["build"]
        store.write(StepRecord(key, _SHARED, seconds, facts, {_ENGINE: store.add(job.workdir / _ENGINE)}))
        return built


def command(product: Product, asked: Switches, ranges: list[Profile]) -> tuple[str, ...]:
    """What was asked of the builder, as a command line would have it."""
    words = [f"--profile={each}" for profile in ranges for each in spell(profile)]
    return (f"{product.module}.Builder", *asked.words(product), *words)


def copy_weights(model: Path, to: Path) -> Path:
    """The lowered model, beside an engine that holds no weights.

    Raises:
        UnsupportedError: its weights lie in files of their own, which the refitter would look for elsewhere.
    """
    beside = [path.name for path in model.parent.iterdir() if path.name.startswith(f"{model.name}.")]
    if beside:
        raise UnsupportedError(
            f"strip_plan: the model's weights lie in a file of their own, {beside[0]}", fix="leave `strip_plan` out"
        )
    shutil.copyfile(model, to)
    return to


def _build(
    job: CompileJob, product: Product, installed: Installed, asked: Switches, ranges: list[Profile], gpu: Gpu | None
) -> Built:
    given = job.options.get("timing_cache")
    cache = None
    if product.times_tactics and gpu:
        cache = _TimingCache(product, installed.version, gpu, job.workdir / TIMING_CACHE, given and Path(given))
    what = f"{product.title.removeprefix('NVIDIA ')}, building for {job.target.tag}"
    env = environment(gpu if product.needs_gpu else None)
    request = {
        "product": product.name,
        "folder": str(installed.folder),
        "model": str(job.model),
        "engine": str(job.workdir / _ENGINE),
        "profiles": ranges,
        "timing_cache": cache.files() if cache else None,
        **dataclasses.asdict(asked),
    }
    answer = call(installed, f"{_WORKER}:build", request, workdir=job.workdir, timeout=job.timeout, what=what, env=env)
    report = {
        "engine_version": answer["version"],
        **{name: answer[name] for name in ("layers", "inputs", "outputs", "warnings", "seconds", "dla")},
        "timing_cache": cache.keep(answer["timing_caches_used"]) if cache else None,
        "shared": False,
    }
    return _checked(job, product, answer["version"], gpu.name if gpu and product.needs_gpu else None, report)


def _checked(job: CompileJob, product: Product, version: str, gpu: str | None, report: dict[str, Any]) -> Built:
    """What the child says is believed once the file itself was read."""
    try:
        header = read_header(job.workdir / _ENGINE, magic=product.magic, version=version)
    except IntegrityError as error:
        raise BuildError(f"{product.title} left no whole engine: {error.what}", fix=error.fix) from error
    return Built(header, version, gpu, report)


def _shared_key(job: CompileJob, product: Product, installed: Installed, asked: Switches, ranges: list[Profile]) -> str:
    files = {path.name: digest_file(path).digest for path in sorted(job.model.parent.iterdir()) if path.is_file()}
    facts = {
        "model": files,
        "product": [product.name, installed.version],
        "switches": dataclasses.asdict(asked),
        "profiles": ranges,
    }
    return "tensorrt-" + digest_bytes(canonical_json(facts)).removeprefix("sha256:")


class _TimingCache:
    """What builds measured, one file for each toolchain version and GPU; no build depends on it being there.

    Read are the local one and the one that the recipe names; the builder holds both against its own version and GPU.

    Args:
        fresh: where the child writes what it knows after the build.
        given: what the recipe names, or the deferred bundle brings.
    """

    def __init__(self, product: Product, version: str, gpu: Gpu, fresh: Path, given: Path | None) -> None:
        slug = re.sub(r"[^a-z0-9.]+", "-", f"{product.name}-{version}-{gpu.name}-sm{gpu.sm}".lower())
        self._kept = Store().home / "timing-caches" / f"{slug}.cache"
        self._fresh = fresh
        self._given = given
        found = [path for path in (self._kept, given) if path is not None and path.is_file()]
        self._digests = {str(path): digest_file(path).digest for path in found}

    def files(self) -> dict[str, Any]:
        return {"read": list(self._digests), "write": str(self._fresh)}

    def keep(self, used: list[str]) -> dict[str, Any]:
        """Put what was measured in its place; of builds at once, the last one's stays."""
        if self._fresh.is_file():
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._kept, self._fresh.read_bytes())
        after = digest_file(self._kept).digest if self._kept.is_file() else None
        read = {path: self._digests[path] for path in used}
        return {
            "file": self._kept.name,
            "read": read.get(str(self._kept)),
            "given": self._digests.get(str(self._given)),
            "given_used": str(self._given) in read,
            "digest": after,
        }

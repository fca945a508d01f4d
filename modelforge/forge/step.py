"""One step of a build: a module-level function over digests and parameters, found and kept by its content key.

A task can be pickled and captures nothing: the same task runs in a thread, in a child process, or on another machine
that shares the store. Knows no recipe, no target and no compiler.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelforge.errors import InputError
from modelforge.store import StepRecord, Store, canonical_json


@dataclass(frozen=True)
class Source:
    """Something from outside that steps work on: brought into the store before the first step.

    Attributes:
        digests: file name -> digest that the plan saw.
        write: puts the files into a folder, under those names.
    """

    title: str
    digests: Mapping[str, str]
    write: Callable[[Path], None] = field(compare=False)

    @functools.cached_property
    def key(self) -> str:
        return _hash({"source": dict(self.digests)})

    def bring_in(self, store: Store) -> StepRecord:
        """Copy the files in, unless they are there.

        Raises:
            InputError: a file has changed since the plan read it.
        """
        if found := store.read(self.key):
            return found
        begun = time.monotonic()
        with store.lock(self.key), store.workdir() as folder:
            if found := store.read(self.key):
                return found
            self.write(folder)
            files = {name: store.add(folder / name) for name in self.digests}
            for name, digest in self.digests.items():
                if digest.startswith("sha256:") and files[name].digest != digest:
                    raise InputError("changed while it was being read", where=name, fix="build again")
            record = StepRecord(self.key, "source", time.monotonic() - begun, {"title": self.title}, files)
            store.write(record)
        return record


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        function: ``module:name``, called with a :class:`Context`.
        code_version: raised whenever the function gives another result for the same inputs.
        params: JSON.
        tools: versions of the software that the step runs.
        needs: the steps and sources whose files it reads.
    """

    name: str
    title: str
    function: str
    code_version: int
    params: Mapping[str, Any]
    tools: Mapping[str, str]
    needs: Mapping[str, Step | Source]

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that the result depends on."""
        return _hash(
            {
                "step": self.name,
                "function": self.function,
                "code": self.code_version,
                "params": dict(self.params),
                "tools": dict(self.tools),
                "needs": {name: need.key for name, need in self.needs.items()},
            }
        )

    def task(self) -> Task:
        needs = {name: need.key for name, need in self.needs.items()}
        return Task(self.key, self.name, self.title, self.function, dict(self.params), needs)


@dataclass(frozen=True)
class Task:
    """A step, ready to be run anywhere: plain values, inputs by the keys of their records in the store."""

    key: str
    name: str
    title: str
    function: str
    params: Mapping[str, Any]
    needs: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """What a step function gives: JSON facts, and files below its work folder."""

    facts: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)


class Context:
    """What a step function sees: its parameters, its inputs out of the store, and a private work folder."""

    def __init__(self, task: Task, store: Store, workdir: Path) -> None:
        self.params = task.params
        self.workdir = workdir
        self._store = store
        self._needs = {name: _must(store.read(key), task, name) for name, key in task.needs.items()}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self._needs)

    def facts(self, need: str) -> Mapping[str, Any]:
        return self._needs[need].facts

    def files(self, need: str) -> dict[str, Path]:
        """The blobs of an input, by file name. Read-only, and their own names say nothing."""
        return {name: self._store.blob_path(blob.digest) for name, blob in self._needs[need].files.items()}

    def folder(self, need: str) -> Path:
        """The files of an input under their own names.

        A single file is a symbolic link; several are copies, as onnx refuses external data behind links.
        """
        folder = self.workdir / "inputs" / need
        if not folder.exists():
            folder.mkdir(parents=True)
            files = self.files(need)
            for name, path in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if len(files) == 1:
                    os.symlink(path.resolve(), folder / name)
                else:
                    shutil.copyfile(path, folder / name)
        return folder


def execute(task: Task, home: str) -> StepRecord:
    """Run a task unless the store has its result. Of several callers at once, one works and the others wait.

    Raises:
        ModelForgeError: what the step says; nothing is kept then.
    """
    store = Store(Path(home))
    if found := store.read(task.key):
        return found
    with store.lock(task.key):
        if found := store.read(task.key):
            return found
        begun = time.monotonic()
        with store.workdir() as folder:
            result = resolve(task.function)(Context(task, store, folder))
            files = {name: store.add(path) for name, path in sorted(result.files.items())}
            record = StepRecord(task.key, task.name, round(time.monotonic() - begun, 3), result.facts, files)
            store.write(record)
        return record


def resolve(function: str) -> Callable[[Context], Result]:
    module, _, name = function.partition(":")
    found: Callable[[Context], Result] = getattr(importlib.import_module(module), name)
    return found


def _must(record: StepRecord | None, task: Task, need: str) -> StepRecord:
    if record is None:
        raise InputError(
            f'the input "{need}" of step "{task.title}" has gone from the store',
            fix="was the cache pruned meanwhile? build again",
        )
    return record


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()

"""One compiler call: the job in, its facts and files out, read back from disk. Used by builds and by `finalize`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelforge.compilers.protocol import CompileJob, Compiler
from modelforge.errors import BuildError


def compile_model(
    compiler: Compiler, job: CompileJob, places: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Compile, and check that what the compiler said is there.

    Args:
        places: folders of this machine and the words that stand for them in the log.

    Returns:
        JSON facts (artifact, commands, requires, needs, notes, report), and bundle file name -> path.

    Raises:
        BuildError: the compiler failed, or a file of its answer is missing or empty.
        UnsupportedError: the compiler cannot have this model.
    """
    compiled = compiler.compile(job)
    for name, path in compiled.files.items():
        if not path.is_file() or path.stat().st_size == 0:
            raise BuildError(f"{compiler.title} said it was done, and {name} is not there or empty")
    facts = {
        "artifact": compiled.artifact,
        "commands": [list(command) for command in compiled.commands],
        "requires": compiled.requires,
        "needs": dict(compiled.needs),
        "notes": list(compiled.notes),
        "report": dict(compiled.report),
    }
    return facts, {**compiled.files, **_log(job.workdir, places)}


def _log(workdir: Path, places: Mapping[str, str]) -> dict[str, Path]:
    """The compiler's log, with the places of this machine taken out; nothing where it said nothing."""
    log = workdir / "worker.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    known = {**places, sys.prefix: "PYTHON", sys.base_prefix: "PYTHON", str(Path.home()): "HOME"}
    for place in sorted(known, key=len, reverse=True):
        text = text.replace(place, known[place])
    if not text.strip():
        return {}
    path = workdir / "compile.log"
    path.write_text(text, encoding="utf-8")
    return {"compile.log": path}

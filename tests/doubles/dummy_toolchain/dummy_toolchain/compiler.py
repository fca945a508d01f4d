"""A third party's compiler, as docs/guides/new-compiler.md shows it: it asks its worker, and reads back what it got."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain
from modelforge.errors import BuildError
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.target import Target
from modelforge.toolchains.definition import Definition, get_definition
from modelforge.toolchains.environments import Environment, call, find, install_command, require

MAGIC = b"DUMMY\0"


@cache
def toolchain() -> Definition:
    return get_definition("dummy")


class DummyCompiler:
    name = "dummy"
    title = "The dummy compiler"
    section = "options"  # [target.options] of a recipe
    code_version = "1"

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        found = find(toolchain())
        if isinstance(found, Environment):
            return Toolchain(versions=found.versions)
        return Missing("its environment is not installed", install_command(toolchain()))

    def dialect(self, target: Target) -> str:
        return "onnxruntime-x86"

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        found = []
        if precision != "fp32":
            found.append(Refusal("precision", "the dummy computes in fp32 only", 'use the ladder ["fp32"]'))
        found += [
            Refusal("option", f'the dummy has no option "{name}"', "its option is `level`")
            for name in options
            if name != "level"
        ]
        return found

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        return []

    def compile(self, job: CompileJob) -> Compiled:
        environment = require(toolchain())
        artifact = job.workdir / "main.dummy"
        request = {"how": "compile", "model": str(job.model), "artifact": str(artifact), **job.options}
        what = f"the dummy, compiling for {job.target.tag}"
        answer = call(environment, request, workdir=job.workdir, timeout=job.timeout, what=what)
        if not artifact.is_file() or not artifact.read_bytes().startswith(MAGIC):
            raise BuildError("what the dummy wrote is no artifact of it", where=artifact.name)
        return Compiled(
            artifact=artifact.name,
            files={artifact.name: artifact},
            commands=(("dummy", "compile", f"--level={answer['level']}", "model.onnx"),),
            requires=f"the dummy runtime {environment.version} or newer",
            needs={"dummy": f">={environment.version}"},
        )

    def runner(self, target: Target) -> str | None:
        return None  # it cannot run here: its lowered model is judged instead, and the record says so

    def runner_hint(self, target: Target) -> str:
        return ""

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        return None

    def run(self, job: RunJob) -> Ran:
        raise BuildError("the dummy has no runner")

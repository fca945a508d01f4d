"""`nox` runs lint, types, the import contract and the tests. `nox -l` lists what else there is."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "imports", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "virtualenv"  # brings pip, which fetches the arm64 runtime

# Real models come in these wheels; --no-deps, as their own runtimes are not wanted.
MODEL_WHEELS = ["rapidocr-onnxruntime>=1.4", "rapidocr>=3", "magika>=1", "nudenet>=3.4", "silero-vad>=6"]
TEST_TOOLS = ["pytest>=8", "hypothesis>=6", "scikit-learn>=1.5", "pillow>=10.1"]
# Independent judges of signatures and of the bill of materials.
TEST_TOOLS += ["securesystemslib>=1.1", "cyclonedx-python-lib[json-validation]>=8"]
# Carries a photograph, for detectors.
TEST_TOOLS += ["matplotlib>=3.9"]
# Child processes do most of the work: two test processes keep two cores busy.
TEST_TOOLS += ["pytest-xdist>=3.6"]
IN_PARALLEL = ["-n", "auto", "--dist", "loadfile"]
# Carries Triton's own definition of config.pbtxt; --no-deps, as its client is not wanted.
MODEL_WHEELS += ["tritonclient>=2.50"]
# pyproject.toml has ranges; what these sessions install is fixed.
LOCKED = ["-c", "constraints.txt"]
# What the marks `rockchip`, `qualcomm` and `ethos_u` ask for: some 1.2 GB on disk, by uv out of its cache.
NPU_TOOLCHAINS = ["rockchip", "qualcomm", "ethos-u"]
LINT_TOOLS = ["ruff>=0.9"]
TYPE_TOOLS = ["mypy>=1.14"]
IMPORT_TOOLS = ["import-linter>=2"]


def _install_all(session: nox.Session) -> None:
    session.install(*LOCKED, "-e", ".[build,tensorrt-rtx,sign]", *TEST_TOOLS)
    session.install(*LOCKED, "--no-deps", *MODEL_WHEELS)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*LOCKED, *LINT_TOOLS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the package."""
    session.install(*LOCKED, "-e", ".[build,sign]", *TYPE_TOOLS)
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """The import contract: downwards only, and the deployer's rooms stay light."""
    session.install(*LOCKED, "-e", ".", *IMPORT_TOOLS)
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """The default suite: under ten minutes on two cores."""
    _install_all(session)
    session.run("pytest", "-m", "not slow", *IN_PARALLEL, *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """What takes longer: kills at random moments, large models, and NPU compilers in environments of their own."""
    _install_all(session)
    # Exports models in the shape of BERT; nothing else wants it.
    session.install("torch==2.13.0")
    # Carries a photograph of a person, for detectors on NPUs.
    session.install("scikit-image==0.26.0")
    home = {"MODELFORGE_HOME": os.path.abspath("build/home")}
    for toolchain in NPU_TOOLCHAINS:  # the vendors' licences are accepted by running this
        session.run("modelforge", "toolchain", "install", toolchain, "--accept-license", env=home)
    marked = " or ".join(["slow", *(name.replace("-", "_") for name in NPU_TOOLCHAINS)])
    session.run("pytest", "-m", marked, *IN_PARALLEL, *session.posargs, env=home)


@nox.session
def light(session: nox.Session) -> None:
    """The deployer's install: no extras, no numpy; `inspect`, `verify` and `targets` work."""
    session.install(*LOCKED, ".", "pytest>=8")
    session.run("pytest", "tests/light", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The figures in the docs, measured here."""
    _install_all(session)
    session.install(*LOCKED, "polygraphy>=0.49")
    session.run("python", "benchmarks/startup.py")
    session.run("python", "benchmarks/rebuild.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Write docs/coverage.md anew: real models through `build` for three targets. Takes long."""
    _install_all(session)
    session.run(
        "python", "docs/make_coverage.py", *session.posargs, env={"MODELFORGE_HOME": os.path.abspath("build/home")}
    )
    if not session.posargs:
        session.run("python", "docs/make_agreement.py")
        home = {"MODELFORGE_HOME": os.path.abspath("build/home")}
        session.run("python", "docs/make_arm_coverage.py", env=home)
        session.run("python", "docs/make_node_coverage.py", env=home)


@nox.session
def lock(session: nox.Session) -> None:
    """Write constraints.txt anew, from the newest releases that the ranges allow."""
    session.install(
        "-e", ".[build,tensorrt-rtx,sign]", *TEST_TOOLS, *LINT_TOOLS, *TYPE_TOOLS, *IMPORT_TOOLS, "polygraphy>=0.49"
    )
    session.install("--no-deps", *MODEL_WHEELS)
    frozen = session.run("python", "-m", "pip", "freeze", "--exclude-editable", silent=True)
    head = "# What CI installs, so that a new release of somebody else's does not break it. Renew: nox -s lock\n"
    Path("constraints.txt").write_text(head + str(frozen), encoding="utf-8")

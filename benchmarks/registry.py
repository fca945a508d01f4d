"""Push and pull of one large blob: modelforge beside skopeo, python-dxf and a bare `curl | sha256sum`.

    python benchmarks/registry.py [megabytes] [rounds]      # 2000 and 3 unless told

A docker-registry on a free loopback port; whole processes, the clients in turn, medians over the rounds. Every pull
begins with nothing: no store, no output. Pushes go into an empty registry each time. What each client does is not the
same: modelforge hashes, writes the blob twice (store and output) and syncs the output to the disk; skopeo and
python-dxf hash and write once, and sync nothing; curl writes nothing. Peak memory is VmHWM of the client's process.
The goals (issue 9): pull at 0.9 of python-dxf's throughput or more, and faster than skopeo; under 80 MB.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.read import Bundle, open_bundle
from modelforge.bundle.record import Artifact, Runtime, VariantRecord
from modelforge.store import digest_file
from tests.registry.servers import Registry, docker_registry

MEMORY_GOAL_MB = 80
DXF_PULL = """
import sys
from dxf import DXF
host, repository, digest, path = sys.argv[1:]
client = DXF(host, repository, insecure=True)
with open(path, "wb") as out:
    for block in client.pull_blob(digest, chunk_size=1 << 20):
        out.write(block)
"""
DXF_PUSH = """
import sys
from dxf import DXF
host, repository, digest, path = sys.argv[1:]
DXF(host, repository, insecure=True).push_blob(filename=path, digest=digest)
"""


@dataclass
class Figures:
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def main(megabytes: int = 2000, rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory(prefix="modelforge-bench-") as folder:
        root = Path(folder)
        bundle = make_bundle(root, megabytes)
        print(f"one blob of {megabytes} MB, {rounds} rounds, {os.cpu_count()} cores")
        report("push", bench_push(root, bundle, rounds), megabytes)
        report("pull", bench_pull(root, bundle, rounds), megabytes)


def bench_push(root: Path, bundle: Bundle, rounds: int) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    engine, digest = source_of(bundle)
    for _ in range(rounds):
        for name, argv in {
            "modelforge": lambda host: modelforge("push", bundle.path, f"{host}/bench/model"),
            "skopeo": lambda host: [
                "skopeo", "copy", "--all", "--dest-tls-verify=false", "-q", f"oci:{bundle.path}",
                f"docker://{host}/bench/model:1.0.0",
            ],
            "python-dxf": lambda host: [sys.executable, "-c", DXF_PUSH, host, "bench/model", digest, str(engine)],
        }.items():  # fmt: skip
            with docker_registry(root / "push") as registry:
                run(found, name, argv(registry.host), root)
            shutil.rmtree(root / "push")
    return found


def bench_pull(root: Path, bundle: Bundle, rounds: int) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    _, digest = source_of(bundle)
    with docker_registry(root / "pull") as registry:
        run({}, "", modelforge("push", bundle.path, f"{registry.host}/bench/model"), root)
        clients = pull_clients(registry, digest, root)
        for _ in range(rounds):
            for name, argv in clients.items():
                for stale in ("home", "out"):
                    shutil.rmtree(root / stale, ignore_errors=True)
                run(found, name, argv(), root)
                check(name, root / "out", bundle)
    return found


def pull_clients(registry: Registry, digest: str, root: Path) -> dict[str, Callable[[], Sequence[str]]]:
    host, out = registry.host, root / "out"

    def dxf() -> list[str]:
        out.mkdir()
        return [sys.executable, "-c", DXF_PULL, host, "bench/model", digest, str(out / "blob")]

    def curl() -> list[str]:
        return ["sh", "-c", f"curl -sf http://{host}/v2/bench/model/blobs/{digest} | sha256sum"]

    return {
        "modelforge": lambda: modelforge("pull", f"{host}/bench/model:1.0.0", "--target", "t4", "-o", out),
        "skopeo": lambda: [
            "skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{host}/bench/model:1.0.0-t4", f"dir:{out}"
        ],
        "python-dxf": dxf,
        "curl | sha256sum": curl,
    }  # fmt: skip


def check(name: str, out: Path, bundle: Bundle) -> None:
    """All bytes came; the figures of a client that failed silently would be good ones."""
    _, digest = source_of(bundle)
    if out.exists():
        largest = max((file.stat().st_size for file in out.rglob("*") if file.is_file()), default=0)
        assert largest == bundle.blobs[digest], name


def run(found: dict[str, Figures], name: str, argv: Sequence[str], root: Path) -> None:
    os.sync()  # what the one before wrote is not paid for by this one
    begun = time.perf_counter()
    environment = {**os.environ, "MODELFORGE_HOME": str(root / "home")}
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peak = [0.0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    _, said = process.communicate()
    seconds = time.perf_counter() - begun
    watcher.join()
    if process.returncode:
        sys.exit(f"{name}: {said.decode()}")
    figures = found.setdefault(name, Figures())
    figures.seconds.append(seconds)
    figures.memory.append(peak[0])


def watch(pid: int, peak: list[float]) -> None:
    """VmHWM only grows: the last value seen, up to 10 ms before the end, is the peak."""
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            line = next(line for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return
        peak[0] = max(peak[0], int(line.split()[1]) * 1024 / 1e6)
        time.sleep(0.01)


def report(title: str, found: dict[str, Figures], megabytes: int) -> None:
    ours = found["modelforge"]
    print(f"\n{title:<18} seconds  (min)    MB/s   peak MB   throughput of modelforge / its")
    for name, figures in found.items():
        memory = "-" if "|" in name else f"{max(figures.memory):.0f}"
        print(
            f"{name:<18} {figures.median:7.2f}  {min(figures.seconds):6.2f}  {megabytes / figures.median:6.0f}   "
            f"{memory:>7}   {figures.median / ours.median:.2f}"
        )
    print(f"memory: {max(ours.memory):.0f} MB, the goal is under {MEMORY_GOAL_MB}")


def modelforge(*args: object) -> list[str]:
    return [sys.executable, "-m", "modelforge.cli.main", *map(str, args)]


def source_of(bundle: Bundle) -> tuple[Path, str]:
    variant = bundle.variants[0]
    return bundle.file(variant, "main.engine"), variant.files["main.engine"].digest


def make_bundle(root: Path, megabytes: int) -> Bundle:
    engine = root / "main.engine"
    with engine.open("wb") as stream:
        for _ in range(megabytes):
            stream.write(os.urandom(1_000_000))
    blob = digest_file(engine)
    record = VariantRecord(
        target="t4",
        status="compiled",
        compiler="tensorrt",
        precision="fp16",
        artifact=Artifact(file="main.engine", digest=blob.digest, size=blob.size),
        runtime=Runtime(requires="nothing: random bytes"),
    )
    file = BundleFile("main.engine", "artifact", "application/octet-stream", engine, blob.digest, blob.size)
    path = write_bundle(root / "bundle", BundleContent("bench", "1.0.0", {}, [VariantContent(record, [file])])).path
    engine.unlink()
    return open_bundle(path)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))

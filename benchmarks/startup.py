"""How long `modelforge --help` takes, beside `polygraphy -h`, and what is imported for it.

    nox -s bench        # or: python benchmarks/startup.py [rounds]

Whole processes, the two programs in turn, medians over the rounds. The limit is 0.3 s (shared design).
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time

LIMIT_SECONDS = 0.3


def main(rounds: int = 15) -> None:
    scripts = sysconfig.get_path("scripts")
    commands = {
        "modelforge --help": [os.path.join(scripts, "modelforge"), "--help"],
        "modelforge build --help": [os.path.join(scripts, "modelforge"), "build", "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    peer = shutil.which("polygraphy", path=scripts)
    if peer:
        commands["polygraphy -h"] = [peer, "-h"]
    else:
        print("polygraphy is not installed: no peer in this run (pip install polygraphy)")
    times: dict[str, list[float]] = {name: [] for name in commands}
    for argv in commands.values():
        run(argv)
    for _ in range(rounds):
        for name, argv in commands.items():
            times[name].append(run(argv))
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:<24} median {median * 1000:6.1f} ms  (min {min(times[name]) * 1000:.1f}, of {rounds})")
    ours = medians["modelforge --help"]
    print(f"of the limit of {LIMIT_SECONDS} s: {ours / LIMIT_SECONDS:.2f}")
    if peer:
        print(f"of polygraphy -h: {ours / medians['polygraphy -h']:.2f}")
    print("\nslowest imports of `modelforge --help` (microseconds, own | with what it imports):")
    profile = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "modelforge.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr.splitlines()[1:]
    for line in sorted(profile, key=lambda line: -int(line.split(":")[1].split("|")[0]))[:12]:
        print(line.removeprefix("import time:"))


def run(argv: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))

"""Writes api/*.json anew, from the real bindings: `python -m tests.compilers.tensorrt.record_api`.

Kept are the classes that the driver reaches, whole: a double made from them knows what exists and what does not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.compilers.tensorrt.bindings import RECORDS, RTX, VERSIONS, read_real
from tests.compilers.tensorrt.uses import check


def main() -> int:
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            api = read_real(version, Path(folder), recorded_only=False)
        found = check(api, "tensorrt-rtx" if version == RTX else "tensorrt")
        reached = {use.kind or use.attribute for use in found.uses} & set(api["classes"])
        kept = {"version": version, "classes": {name: api["classes"][name] for name in sorted(reached)}}
        (RECORDS / f"{version}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        sys.stdout.write("\n  ".join([f"{version}: {len(reached)} classes", *found.missing, *found.unknown, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

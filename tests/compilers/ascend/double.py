"""Installs of the double of ATC, as CANN's are laid out: bin/atc, a version file, set_env.sh."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "doubles" / "atc"


@dataclass(frozen=True)
class Double:
    """One install.

    Attributes:
        root: what $MODELFORGE_ATC may name.
        log: one JSON line for each call: argv, cwd, leaked variables.
    """

    root: Path
    log: Path

    @property
    def program(self) -> Path:
        return self.root / "bin" / "atc"

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def drive(self, behaviour: str = "", **facts: Any) -> None:
        """Say how the next calls go: a behaviour of the double, or ``code`` and ``message`` of a failure."""
        document = {"behaviour": behaviour, "log": str(self.log), **facts}
        (self.root / "drive.json").write_text(json.dumps(document))


def install(folder: Path, version: str = "8.2.RC1") -> Double:
    """A new install below ``folder``; its version says that it is a double."""
    root = folder / "cann"
    (root / "bin").mkdir(parents=True)
    for name in ("atc", "contract.json"):
        shutil.copy(SOURCE / name, root / "bin" / name)
    (root / "x86_64-linux").mkdir()
    info = (SOURCE / "ascend_toolkit_install.info").read_text().replace("8.2.RC1", version)
    (root / "x86_64-linux" / "ascend_toolkit_install.info").write_text(info)
    # As CANN's own: not safe under `set -u`, and it looks at its arguments.
    (root / "set_env.sh").write_text(
        f'if [ "$1" = --model ]; then echo "arguments reached set_env.sh"; exit 9; fi\n'
        f"export ASCEND_TOOLKIT_HOME={root}\n"
        f'export LD_LIBRARY_PATH="{root}/lib64:$LD_LIBRARY_PATH"\n'
        f'export ATC_DOUBLE="{root}/drive.json" NOT_SET="$NEVER_SET_BEFORE"\n'
        f'export PATH="{root}/bin:$PATH"\n'
    )
    double = Double(root, folder / "calls.jsonl")
    double.drive()
    return double

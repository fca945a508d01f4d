"""The other side of :mod:`modelforge.toolchains.worker`: one call, then the process ends."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from modelforge.errors import ModelForgeError


def main(argv: list[str]) -> int:
    function, request_file, answer_file = argv
    module_name, _, name = function.partition(":")
    try:
        request = json.loads(Path(request_file).read_text(encoding="utf-8"))
        answer: dict[str, Any] = {"result": getattr(importlib.import_module(module_name), name)(request)}
    except ModelForgeError as error:
        answer = {"error": {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}}
    except Exception as error:  # whatever a vendor library throws becomes one clear failure of this call
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0]
        answer = {"error": {"type": "BuildError", "what": f"{type(error).__name__}: {first_line}"}}
    temporary = Path(answer_file + ".part")
    temporary.write_text(json.dumps(answer), encoding="utf-8")
    temporary.replace(answer_file)
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter shutdown: vendor libraries crash in their destructors after the work is done.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

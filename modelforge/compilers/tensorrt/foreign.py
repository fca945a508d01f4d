"""Run by another interpreter, which has NVIDIA's module: ``python -I foreign.py MODULE:FUNCTION REQUEST ANSWER``.

That interpreter may be Python 3.10 with NumPy and TensorRT and nothing else, so this file and all that it leads to are
written for it (a test holds that). It sees our package, and none of the packages beside ours.
"""

import json
import sys

OLDEST = (3, 10)


def main(argv: "list[str]") -> int:
    """As :func:`modelforge.toolchains.child.main`."""
    if sys.version_info < OLDEST:
        told = "it is Python {}.{}, and {}.{} is the oldest that will do".format(*sys.version_info[:2], *OLDEST)
        with open(argv[-1], "w") as stream:
            json.dump({"error": {"type": "ToolchainMissing", "what": told}}, stream)
        return 0
    _open_package()
    from modelforge.toolchains.child import main as answer

    return answer(argv)


def _open_package() -> None:
    """Make ``modelforge`` importable by its place, and nothing that is installed beside it."""
    import importlib.util
    from pathlib import Path

    folder = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        "modelforge", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError("modelforge is not where this file is")
    package = importlib.util.module_from_spec(spec)
    sys.modules["modelforge"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

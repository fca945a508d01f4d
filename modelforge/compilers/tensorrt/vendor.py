"""In a child process: loads NVIDIA's module by name, and listens to what it says. Nothing else imports it.

``trt`` is the module, ``vendor`` stands for it in annotations: the contract tests follow both through this package's
sources and hold what they find against the real bindings of every version.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from modelforge.compilers.tensorrt.messages import is_beside_the_point
from modelforge.compilers.tensorrt.product import PRODUCTS
from modelforge.errors import ToolchainMissing

if TYPE_CHECKING:
    import tensorrt_rtx as vendor


def load(request: dict[str, Any]) -> Any:
    """The module of ``request["product"]``, from where the parent found it (``request["folder"]``).

    Raises:
        ToolchainMissing: it cannot be imported: a library that it needs is not here.
    """
    product = PRODUCTS[request["product"]]
    folder = request.get("folder")
    if folder and folder not in sys.path:
        sys.path.append(folder)  # last: what this interpreter has of its own comes first
    try:
        return importlib.import_module(product.module)
    except ImportError as error:
        raise ToolchainMissing(
            f"{product.title} is installed and cannot be loaded: {error}",
            fix=f"{product.install}; its libraries must be on the loader's path (LD_LIBRARY_PATH)",
        ) from error


class Heard:
    """What was said, by severity: ``VERBOSE`` left out, and lines that name a GPU where none is needed set apart."""

    def __init__(self, needs_gpu: bool) -> None:
        self._needs_gpu = needs_gpu
        self._lines: list[tuple[str, str]] = []

    def add(self, severity: str, message: str) -> None:
        if severity == "VERBOSE":
            return
        if is_beside_the_point(message, self._needs_gpu):
            severity, message = "INFO", f"(no GPU is needed for this; not the cause of anything) {message}"
        print(f"[{severity}] {message}", flush=True)  # noqa: T201  # stdout is the log of this child
        if severity != "INFO":
            self._lines.append((severity, message.strip()))

    def warnings(self) -> list[str]:
        return self._told("WARNING")

    def errors(self) -> list[str]:
        return self._told("ERROR", "INTERNAL_ERROR")

    def _told(self, *severities: str) -> list[str]:
        """What was said at these severities, each once, in order."""
        return list(dict.fromkeys(message for severity, message in self._lines if severity in severities))


def listen(trt: Any, heard: Heard) -> vendor.ILogger:
    """A logger that tells ``heard``. The caller keeps it: TensorRT only borrows it."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the vendor package has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: vendor.ILogger.Severity, msg: str) -> None:
            heard.add(severity.name, msg)

    return Logger()

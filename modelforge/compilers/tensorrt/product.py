"""NVIDIA's two products that build engines, as rows of a table: what differs between them and between their versions.

Imports no vendor module. What is the same everywhere stands in the code that uses it, and nowhere here.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

MEASURED = "measured on TensorRT-RTX 1.7.1.116"

Version = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """One product.

    Attributes:
        name: our compiler of that name; ``title`` is what NVIDIA calls it.
        module: Python module; its object model is the same in both, as far as ``worker.py`` and ``running.py`` go
            (tests/compilers/tensorrt/test_contract.py asks the real bindings).
        distributions: packages that carry it, any of which tells its version.
        magic: the first four bytes of its engines.
        tested: version lines whose bindings the contract tests read.
        needs_gpu: builds only on a GPU of the target's compute capability.
        names_capabilities: is told the compute capabilities to build for, one or several.
        times_tactics: measures kernels as it builds, and keeps what it measured in a timing cache.
    """

    name: str
    title: str
    module: str
    distributions: tuple[str, ...]
    install: str
    magic: str
    tested: tuple[str, ...]
    needs_gpu: bool
    names_capabilities: bool
    times_tactics: bool

    @property
    def python_variable(self) -> str:
        """The environment variable that names another interpreter, which has the module."""
        return f"MODELFORGE_{self.module.upper()}_PYTHON"


TENSORRT = Product(
    name="tensorrt",
    title="NVIDIA TensorRT",
    module="tensorrt",
    distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    install="install TensorRT on the device: JetPack brings it; elsewhere pip install 'modelforge[tensorrt]'",
    magic="ftrt",
    tested=("10.3", "10.13", "11.4"),
    needs_gpu=True,
    names_capabilities=False,
    times_tactics=True,
)

TENSORRT_RTX = Product(
    name="tensorrt-rtx",
    title="NVIDIA TensorRT-RTX",
    module="tensorrt_rtx",
    distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    install="pip install 'modelforge[tensorrt-rtx]'",
    magic="vtrt",
    tested=("1.7",),
    needs_gpu=False,
    names_capabilities=True,
    times_tactics=False,  # "no effect", its documentation says, and setting one asks for a GPU (1.7)
)

Function = TypeVar("Function", bound=Callable[..., Any])


def only(name: str) -> Callable[[Function], Function]:
    """Marks a function that calls what one product alone has; the contract tests ask that one's bindings only."""
    assert name in PRODUCTS

    def mark(function: Function) -> Function:
        return function

    return mark


PRODUCTS = {product.name: product for product in (TENSORRT, TENSORRT_RTX)}


def find(product: Product) -> tuple[str, Path] | None:
    """The product's version and the folder of its module, without importing it; None where this interpreter has none.

    :mod:`~modelforge.compilers.tensorrt.installation` looks into other interpreters too.
    """
    spec = importlib.util.find_spec(product.module)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    version = _packaged_version(product) or _written_version(folder)
    return (version, folder.parent) if version else None


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """In a child process: what the interpreter that runs this has of ``request["product"]``."""
    found = find(PRODUCTS[request["product"]])
    return {
        "version": found and found[0],
        "folder": found and str(found[1]),
        "python": ".".join(map(str, sys.version_info[:3])),
        "numpy": importlib.util.find_spec("numpy") is not None,
    }


def parse_version(text: str) -> Version:
    """``10.3.0`` and ``10.13.3.9+double`` as numbers, to be compared."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0]))


def is_tested(product: Product, version: str) -> bool:
    return any(parse_version(version)[:2] == parse_version(line) for line in product.tested)


def _packaged_version(product: Product) -> str | None:
    import importlib.metadata  # a third of what this package takes to import, and no child process asks

    for distribution in product.distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _written_version(folder: Path) -> str | None:
    """What ``__init__.py`` says: a copy from NVIDIA's tar archive has no package metadata."""
    try:
        text = (folder / "__init__.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r'^__version__ = ["\']([0-9][^"\']*)', text, re.M)
    return found.group(1) if found else None

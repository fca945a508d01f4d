"""Bundles to report on, one Chromium for all tests that look at a page, and a place for bundles made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from modelforge.bundle.read import open_bundle
from modelforge.report import Report, collect
from tests.report.browser import CHROMIUM, Page, chromium
from tests.report.report_bundles import Documents, Maker, int8_bundle, record
from tests.report.split_bundles import split_bundle

MakeReport = Callable[..., Report]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return int8_bundle(tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="session")
def report(bundle: Path) -> Report:
    return collect(open_bundle(bundle))


@pytest.fixture(scope="session")
def split_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_bundle(tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="session")
def split_report(split_path: Path) -> Report:
    return collect(open_bundle(split_path))


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """A bundle of one INT8 variant with the given report files; ``more`` replaces keys of its record."""

    def make(documents: Mapping[str, Documents | bytes], about: Mapping[str, Any] | None = None, **more: Any) -> Path:
        number = len(list(tmp_path.glob("made-*")))
        maker = Maker(tmp_path / f"made-{number}")
        maker.add(record("t4", "int8", drop=0.002, sqnr=27.9) | more, documents)
        return maker.write(tmp_path / f"made-{number}" / "bundle", about)

    return make


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def hostile_split() -> dict[str, Any]:
    """`about` of a split model in which every name tries to be markup."""
    from tests.report.split_bundles import named_split
    from tests.report.test_page import HOSTILE

    return named_split(HOSTILE)


@pytest.fixture
def hostile_documents() -> dict[str, Any]:
    """Report files with names that try to be markup."""
    from tests.report.report_bundles import accuracy_document, calibration_document, sensitivity_document
    from tests.report.test_page import HOSTILE

    accuracy, calibration = accuracy_document(drop=0.01, sqnr=20.0, kept=3), calibration_document(3)
    for layer in accuracy["layers"]:
        layer |= {"node": HOSTILE + layer["node"], "reason": HOSTILE}
    accuracy["reasons"] = [HOSTILE, "x" * 4000]
    calibration["tensors"][0]["name"] = HOSTILE
    return {
        "accuracy.json": accuracy,
        "calibration.json": calibration,
        "sensitivity.json": sensitivity_document() | {"metric": HOSTILE},
    }

"""`modelforge tuning`: what was measured is listed, and taken from one store to another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelforge.compilers.tvm import archive, database
from modelforge.store import StepRecord, Store
from tests.conftest import Forge

KEYS = ("a" * 64, "ab" * 32)


def _database(device: str, *, kept: bool = True) -> database.Database:
    return database.Database(
        rules="3, TVM 0.27.0.post1", machine={"mcpu": "cortex-a76", "cores": 4}, device=device, trials=9,
        choices={"convolution tile: nn.conv2d(float32[1,8])": "[4,2,8]"} if kept else {}, kept=kept,
        reason="" if kept else "no gain beyond noise", kernels=(),
        measured=database.Measured(measured=9, refused=0, wrong=0),
        model=(database.Entry(entry="main_b1", tuned_ms=9.0, untuned_ms=10.0, ratio=0.9, rounds=21),),
    )  # fmt: skip


@pytest.fixture
def tuned(tmp_path: Path) -> Forge:
    """A machine on which two models were tuned."""
    store = Store(tmp_path / "home")
    for key, device in zip(KEYS, ("pi5", "pi4"), strict=True):
        file = tmp_path / "tuning.json"
        file.write_bytes(_database(device, kept=device == "pi5").to_json())
        store.write(StepRecord(key, archive.STEP, 3.0, {"device": device}, {database.FILE: store.add(file)}))
    return Forge(tmp_path / "home", tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Forge:
    return Forge(tmp_path / "other", tmp_path)


def test_what_was_tuned_is_listed(tuned: Forge, other: Forge) -> None:
    found = {each["device"]: each for each in tuned("tuning", "ls", "--json").json["tunings"]}
    assert found["pi5"]["key"] == KEYS[0]
    assert (found["pi5"]["choices"], found["pi4"]["choices"], found["pi4"]["kept"]) == (1, 0, False)
    shown = tuned("tuning", "ls").out
    assert "0.900" in shown
    assert "cortex-a76" in shown
    assert "nothing was tuned here" in other("tuning", "ls").out


def test_it_goes_from_one_store_to_another_whole(tuned: Forge, other: Forge, tmp_path: Path) -> None:
    exported = tuned("tuning", "export", str(tmp_path / "all.json"), "--json")
    assert (exported.code, len(exported.json["tunings"])) == (0, 2)
    imported = other("tuning", "import", str(tmp_path / "all.json"), "--json")
    assert {each["key"] for each in imported.json["tunings"]} == {*KEYS}
    here, there = Store(tmp_path / "home"), Store(tmp_path / "other")
    for key in KEYS:
        one, two = here.read(key), there.read(key)
        assert one is not None
        assert two is not None
        assert one.files == two.files, "the same database, byte for byte"
    again = other("tuning", "export", str(tmp_path / "again.json"), KEYS[0][:6], KEYS[1][:6])
    assert again.code == 0
    first, second = (
        {each["key"]: each for each in json.loads((tmp_path / name).read_text(encoding="utf-8"))["tunings"]}
        for name in ("all.json", "again.json")
    )
    assert first == second


def test_some_of_it_by_key(tuned: Forge, tmp_path: Path) -> None:
    done = tuned("tuning", "export", str(tmp_path / "one.json"), KEYS[1][:8], "--json")
    assert [each["device"] for each in done.json["tunings"]] == ["pi4"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("ls", "all.json"), "`tuning ls` takes no words"),
        (("export",), "`tuning export` takes a FILE"),
        (("import", "a", "b"), "`tuning import` takes a FILE alone"),
        (("export", "x.json", "abcdef12"), "is the key of no tuning"),
        (("export", "x.json", "a"), "is the key of 2 tunings"),
        (("export", "no/such/folder.json"), "cannot be written: No such file"),
        (("import", "gone.json"), "there is no such file"),
    ],
)
def test_bad_words_are_told_with_what_to_do(tuned: Forge, words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = tuned("tuning", *words)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"schema": 2, "tunings": []}', '{"schema": 1, "tunings": []}', "[" * 99999,
        '{"schema": 1, "tunings": [{"key": "../../../etc", "database": {}}]}', _database("pi5").to_json().decode(),
    ],
)  # fmt: skip
def test_what_holds_no_tunings_is_refused_and_nothing_is_kept(other: Forge, text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    done = other("tuning", "import", "bad.json")
    assert done.code == 2
    assert "no file of tunings" in done.err or "holds no tuning" in done.err
    assert "modelforge tuning export" in done.err
    assert other("tuning", "ls", "--json").json["tunings"] == []


def test_nothing_to_export_is_told(other: Forge, tmp_path: Path) -> None:
    done = other("tuning", "export", "x.json")
    assert (done.code, (tmp_path / "x.json").exists()) == (2, False)
    assert "nothing was tuned here" in done.err

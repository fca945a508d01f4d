"""Content keys and the execution of one step."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from modelforge.errors import BuildError, InputError
from modelforge.forge.step import Context, Result, Source, Step, execute
from modelforge.store import Store, digest_file


def shout(context: Context) -> Result:
    """A step function of this test: upper-cases its input, and counts its runs."""
    count = Path(context.params["count"])
    count.write_text(count.read_text() + "x")
    text = (context.folder("text") / "text.txt").read_text()
    if text == "fail":
        raise BuildError("told to fail")
    out = context.workdir / "out.txt"
    out.write_text(text.upper())
    return Result({"length": len(text)}, {"out.txt": out})


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Step]:
    (tmp_path / "count").write_text("")

    def step(text: str) -> Step:
        (tmp_path / "text.txt").write_text(text)

        def write(folder: Path) -> None:
            (folder / "text.txt").write_text(text)

        source = Source("text", {"text.txt": digest_file(tmp_path / "text.txt").digest}, write)
        params = {"count": str(tmp_path / "count")}
        return Step("shout", "shout", "tests.forge.test_step:shout", 1, params, {"tool": "1.0"}, {"text": source})

    return step


def run(step: Step, store: Store):
    for need in step.needs.values():
        assert isinstance(need, Source)
        need.bring_in(store)
    return execute(step.task(), str(store.home))


def test_runs_once_and_is_found_again(tmp_path: Path, make: Callable[[str], Step]) -> None:
    store = Store(tmp_path / "home")
    first = run(make("hello"), store)
    second = run(make("hello"), store)
    assert first == second
    assert store.blob_path(first.files["out.txt"].digest).read_text() == "HELLO"
    assert (tmp_path / "count").read_text() == "x"
    assert list((store.home / "work").iterdir()) == []


def test_failures_are_not_kept(tmp_path: Path, make: Callable[[str], Step]) -> None:
    store = Store(tmp_path / "home")
    for _ in range(2):
        with pytest.raises(BuildError, match="told to fail"):
            run(make("fail"), store)
    assert (tmp_path / "count").read_text() == "xx"
    assert list((store.home / "work").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"tools": {"tool": "1.1"}},
        {"code_version": 2},
        {"params": {"count": "elsewhere"}},
        {"name": "whisper"},
        {"function": "tests.forge.test_step:other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_is_in_the_key(make: Callable[[str], Step], change: dict[str, object]) -> None:
    step = make("hello")
    assert replace(step, **change).key != step.key


def test_inputs_are_in_the_key_and_titles_are_not(make: Callable[[str], Step]) -> None:
    step = make("hello")
    assert make("other").key != step.key
    assert replace(step, title="anything").key == step.key


def test_a_task_can_be_sent_elsewhere(tmp_path: Path, make: Callable[[str], Step]) -> None:
    store = Store(tmp_path / "home")
    step = make("hello")
    step.needs["text"].bring_in(store)  # type: ignore[union-attr]  # it is a source
    record = execute(pickle.loads(pickle.dumps(step.task())), str(store.home))
    assert record.facts == {"length": 5}


def test_a_file_that_changes_under_the_plan_is_told(tmp_path: Path, make: Callable[[str], Step]) -> None:
    step = make("hello")
    source = step.needs["text"]
    assert isinstance(source, Source)
    changed = replace(source, write=lambda folder: (folder / "text.txt").write_text("other") and None)
    store = Store(tmp_path / "home")
    with pytest.raises(InputError, match="changed while it was being read"):
        changed.bring_in(store)
    assert store.read(source.key) is None

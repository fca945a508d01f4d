"""The text that a library carries about itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.tvm import player
from modelforge.compilers.tvm.signature import Entry, Signature, Tensor, Weight, merge_shapes, parse

NAMES = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1).filter(
    lambda text: text.splitlines() == [text]
)
SHAPES = st.lists(st.integers(1, 4096), max_size=6).map(tuple)
TENSORS = st.builds(
    Tensor,
    NAMES,
    st.sampled_from(["float32", "float16", "int64", "bool"]),
    SHAPES | SHAPES.map(lambda shape: ("*", *shape)),
)


WEIGHTS = st.builds(Weight, st.integers(0, 1 << 40).map(lambda n: n * 64), st.sampled_from(["float32", "int8"]), SHAPES)


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    weights = draw(st.lists(WEIGHTS, max_size=5))
    rows = st.lists(st.sampled_from(range(len(weights))), unique=True).map(tuple) if weights else st.just(())
    batches = sorted(draw(st.sets(st.integers(1, 512), min_size=1, max_size=4)))
    return Signature(
        inputs=tuple(draw(st.lists(TENSORS, max_size=4))),
        outputs=tuple(draw(st.lists(TENSORS, max_size=4))),
        entries=tuple(Entry(batch, f"main_b{batch}", draw(rows)) for batch in batches),
        weights=tuple(weights),
        weight_bytes=draw(st.integers(0, 1 << 40)),
        threads=draw(st.integers(1, 256)),
    )


@given(signatures())
def test_reads_back_what_it_wrote(signature: Signature) -> None:
    assert parse(signature.text()) == signature


@given(signatures())
def test_the_player_reads_what_is_written_here(signature: Signature) -> None:
    """It stands alone, so that it has a reader of its own."""
    found = player._read(signature.text(), Path("main.so"))
    assert (found.threads, found.weight_bytes) == (signature.threads, signature.weight_bytes)
    for own, ours in ((found.inputs, signature.inputs), (found.outputs, signature.outputs)):
        assert [(t.name, t.dtype, t.shape) for t in own] == [(t.name, t.dtype, t.shape) for t in ours]
    assert [(w.offset, w.dtype, w.shape) for w in found.weights] == [
        (w.offset, w.dtype, w.shape) for w in signature.weights
    ]
    assert [(e.batch, e.function, e.weights) for e in found.entries] == [
        (e.batch, e.function, e.weights) for e in signature.entries
    ]


@pytest.mark.parametrize(
    "text", ["", "modelforge-tvm 1\n", "modelforge-tvm 2\n", "modelforge-tvm 2\nbias float32 0 w\nentry 1 main\n"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse(text)
    with pytest.raises(RuntimeError, match=r"main\.so"):
        player._read(text, Path("main.so"))


def test_the_batch_is_the_leading_dimension() -> None:
    assert merge_shapes([(1, 10), (4, 10)], [1, 4]) == ("*", 10)


@pytest.mark.parametrize("shapes", [[(10,), (10,)], [(1, 10), (4, 40)], [(2, 10), (8, 10)], [(), ()]])
def test_an_output_that_padding_would_change_is_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="its shapes are"):
        merge_shapes(shapes, [1, 4])

"""The text that a library carries about itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.tvm.signature import Entry, Signature, Tensor, merge_shapes, parse

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


@given(st.lists(TENSORS, max_size=4), st.lists(TENSORS, max_size=4), st.sets(st.integers(1, 512), min_size=1))
def test_reads_back_what_it_wrote(inputs: list[Tensor], outputs: list[Tensor], batches: set[int]) -> None:
    entries = tuple(Entry(batch, f"main_b{batch}") for batch in sorted(batches))
    signature = Signature(tuple(inputs), tuple(outputs), entries)
    assert parse(signature.text()) == signature


@pytest.mark.parametrize("text", ["", "modelforge-tvm 2\n", "modelforge-tvm 1\nweight float32 0 w\n"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse(text)


def test_the_batch_is_the_leading_dimension() -> None:
    assert merge_shapes([(1, 10), (4, 10)], [1, 4]) == ("*", 10)


@pytest.mark.parametrize("shapes", [[(10,), (10,)], [(1, 10), (4, 40)], [(2, 10), (8, 10)], [(), ()]])
def test_an_output_that_padding_would_change_is_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="its shapes are"):
        merge_shapes(shapes, [1, 4])

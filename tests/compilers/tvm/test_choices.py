"""The seam between rules and measured picks: what is asked, what a database may answer, and what it may not."""

from __future__ import annotations

from modelforge.compilers.tvm import choices
from modelforge.compilers.tvm.kernels.tiles import Tile

TILES = [Tile(6, 2, 8), Tile(4, 2, 8), Tile(1, 1, 8)]


def _ask(question: str = "tile") -> Tile:
    return choices.chosen(question, TILES[0], lambda: TILES[1:])


def _about(rule: str = "convolution", geometry: str = "nn.conv2d(float32[1,8,8,4])") -> None:
    choices.about(lambda: geometry)
    choices.asks(rule)


KEY = "convolution tile: nn.conv2d(float32[1,8,8,4])"


def test_a_rule_has_its_own_way_without_a_session() -> None:
    _about()
    assert _ask() == TILES[0]


def test_a_database_selects_one_of_the_rules_own_candidates() -> None:
    with choices.session({KEY: "[4,2,8]"}) as said:
        _about()
        assert _ask() == TILES[1]
    assert said.applied == {KEY}


def test_a_database_cannot_make_a_rule_do_what_it_would_not() -> None:
    with choices.session({KEY: "[400,2,8]"}) as said:
        _about()
        assert _ask() == TILES[0]
    assert said.refused == {KEY}
    assert not said.applied


def test_questions_are_told_apart_by_rule_geometry_and_order() -> None:
    with choices.session(listing=True) as said:
        for rule, geometry in (("winograd", "a"), ("convolution", "a"), ("convolution", "b")):
            _about(rule, geometry)
            _ask()
            _ask()
            _ask("chunk")
            choices.made(lambda: "call")
    keys = [key for site in said.sites for key in site.asked]
    assert keys[:3] == ["winograd tile: a", "winograd tile 2: a", "winograd chunk: a"]
    assert len(set(keys)) == 9
    assert said.sites[0].asked["winograd tile: a"] == ("[6,2,8]", "[4,2,8]", "[1,1,8]")


def test_what_a_rule_asked_before_it_declined_counts_for_the_operator() -> None:
    """Another answer might have made it take the operator."""
    with choices.session(listing=True) as said:
        choices.about(lambda: "a")
        choices.asks("winograd")
        choices.chosen("plan", None, lambda: ["plan"])
        choices.asks("convolution")
        _ask()
        choices.made(lambda: "call")
    assert list(said.sites[0].asked) == ["winograd plan: a", "convolution tile: a"]
    assert said.sites[0].asked["winograd plan: a"] == ("null", '"plan"')


def test_operators_that_ask_nothing_are_no_sites() -> None:
    with choices.session(listing=True) as said:
        _about()
        choices.made(lambda: "call")
    assert said.sites == []


def test_candidates_are_not_listed_where_nobody_searches() -> None:
    def others() -> list[Tile]:
        raise AssertionError("a compile has no use for them")

    with choices.session():
        _about()
        assert choices.chosen("tile", TILES[0], others) == TILES[0]

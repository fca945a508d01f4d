"""Short forms of push and pull for tests, and a look at a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelforge.bundle.read import Bundle
from modelforge.registry import reference
from modelforge.registry.pull import Pulled, Wanted, pull
from modelforge.registry.push import Pushed, push
from modelforge.registry.session import Connection


def push_to(bundle: Bundle | Path, place: str, connection: Connection | None = None, **options: Any) -> Pushed:
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    where = reference.registry(place)
    return push(path, where, (connection or Connection()).client(where, writing=True), **options)


def pull_from(
    place: str,
    target: str | tuple[str, ...] | None,
    output: Path,
    connection: Connection | None = None,
    *,
    stage: str | None = None,
    **options: Any,
) -> Pulled:
    """``target`` None: the whole bundle."""
    targets = (target,) if isinstance(target, str) else target or ()
    source = (connection or Connection()).source(reference.parse(place))
    return pull(source, Wanted(targets, stage, target is None), output, **options)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if not file.is_dir()}

"""What a split was chosen among, as JSON: for the command line, and for the bundle and its report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modelforge.forge.splitting import Planned
from modelforge.graph.cuts import cheapest
from modelforge.graph.split_tiers import TRANSPORTS, TierCut, TierProblem, evaluate, sweep, top_cuts

_SWEEP = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0, 256.0)
"""What the bandwidths are multiplied by, to show how the choice depends on them."""
_CANDIDATES = 10


def candidates(planned: Planned) -> list[dict[str, Any]]:
    """The cuts that least crosses, in the order of the model, with bytes by transport. JSON."""
    graph = planned.graph
    total = sum(layer.flops or 0 for layer in graph.layers) or 1
    return [
        {
            "tensors": names,
            "flops_before": sum(layer.flops or 0 for layer in graph.layers[:boundary]) / total,
            "bytes": {
                each: sum(graph.tensors[name].transport_bytes(each) or 0 for name in names) for each in TRANSPORTS
            },
        }
        for boundary, names in cheapest(graph, _CANDIDATES)
    ]


def tier_choices(problem: TierProblem) -> dict[str, Any]:
    """The best cuts over tiers and links, and how the best one changes with the bandwidth. JSON, all estimates."""
    known = [cut for cut in top_cuts(problem, _CANDIDATES) if _is_known(problem, cut)]
    swept = [(factor, cut) for factor, cut in sweep(problem, _SWEEP) if _is_known(problem, cut)]
    return {
        "estimate": True,
        "transport": problem.transport,
        "return_outputs": problem.return_outputs,
        "links": [
            {"from": near, "to": far, "latency_ms": link.latency * 1e3, "bandwidth": link.bandwidth}
            for (near, far), link in problem.links.items()
        ],
        "cuts": [_cut_facts(problem, cut) for cut in known],
        "sweep": [{"factor": factor, **_cut_facts(problem, cut)} for factor, cut in swept],
    }


def _is_known(problem: TierProblem, cut: TierCut) -> bool:
    """Whether the size of all that travels is known: without it a way has no time."""
    tensors = problem.graph.tensors
    sent = {name for names in cut.crossing.values() for name in names}
    if problem.return_outputs and len(cut.route) > 1:
        sent |= {name for name in problem.graph.outputs if name in tensors}
    return all(tensors[name].bytes is not None for name in sent if name in tensors)


def _cut_facts(problem: TierProblem, cut: TierCut) -> dict[str, Any]:
    return {
        "kind": cut.kind,
        "route": list(cut.route),
        "crossing": {link: list(names) for link, names in cut.crossing.items()},
        "bytes": dict(cut.bytes),
        "tier_ms": {name: seconds * 1e3 for name, seconds in cut.tier_seconds.items()},
        "link_ms": {name: seconds * 1e3 for name, seconds in cut.link_seconds.items()},
        "total_ms": cut.seconds * 1e3,
        "total_ms_at": {
            each: evaluate(replace(problem, transport=each), cut.labels).seconds * 1e3 for each in TRANSPORTS
        },
        "fits": cut.fits,
    }

"""LLMServices as a person wants to see them in a terminal: for ``blockyard status``, ``top`` and ``up``.

Shows what the API server stores (or the local runtime writes) and nothing else, so that it is what every
other tool sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BAR = 24  # characters
STATES = {"Ready": "green", "Draining": "yellow", "Starting": "cyan", "Pending": "cyan", "Failed": "red"}
QUIET_IF_FALSE = ("Degraded", "Progressing")
Raw = Mapping[str, Any]


def overview(services: Sequence[Raw], moves: Sequence[Raw] = ()) -> RenderableType:
    """One block per service: its conditions, its pool, its agents, what was decided last; then the moves."""
    if not services:
        return Text("no LLMService", style="dim")
    parts: list[RenderableType] = []
    for raw in services:
        name = raw["metadata"]["name"]
        mine = [move for move in moves if move["spec"].get("service") == name]
        parts += [*_service(raw, mine), Text()]
    return Group(*parts[:-1])


def _service(raw: Raw, moves: Sequence[Raw]) -> list[RenderableType]:
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    head = Text(f"{metadata.get('namespace', '')}/{metadata['name']}", style="bold")
    head.append(f"  {status.get('readyReplicas', 0)} of {spec.get('replicas', 1)} ready", style="")
    head.append(f"  {status.get('url', '')}", style="dim")
    if metadata.get("generation", 0) > status.get("observedGeneration", 0):
        head.append("  (not yet seen by the operator)", style="yellow")
    parts: list[RenderableType] = [head, *map(_condition, status.get("conditions") or ())]
    if scaling := status.get("autoscaling"):
        parts.append(_autoscaling(scaling, spec.get("autoscaling") or {}))
    parts += [
        Text.assemble(f"  {tier:6} ", _bar(pool), _numbers(pool))
        for tier, pool in (status.get("pool") or {}).items()
        if pool.get("total")
    ]
    agents = status.get("agents") or []
    if agents:
        parts.append(_agents(agents))
    if moves:
        parts.append(_moves(moves))
    for decision in (status.get("decisions") or [])[:5]:
        what = f"{decision['action']} {decision['agent']}".rstrip()
        line = f"  {decision['time'][11:19]}  {what}: {decision['reason']}"
        parts.append(Text(f"{line}, {decision['message']}" if decision.get("message") else line, style="dim"))
    return parts


def _condition(condition: Raw) -> Text:
    good = condition["status"] == ("False" if condition["type"] in QUIET_IF_FALSE else "True")
    line = Text(f"  {condition['type']:12}", style="green" if good else "yellow")
    line.append(f"{condition['status']:8}{condition['reason']}", style="")
    if condition.get("message"):
        line.append(f": {condition['message']}", style="" if not good else "dim")
    return line


def _autoscaling(scaling: Raw, spec: Raw) -> Text:
    bounds = f"{spec.get('minReplicas', 1)} to {spec.get('maxReplicas', '?')} agents"
    line = Text(f"  {'Autoscaling':12}{bounds}, {scaling['wanted']} wanted: {scaling['reason']}")
    if since := scaling.get("since"):
        line.append(f"; so few are enough since {since[11:19]}", style="dim")
    return line


def _bar(pool: Raw) -> Text:
    """Active, cached and free blocks to scale; what there is of shows at least once."""
    total = max(1, pool.get("total", 0))
    active, cached = (-(-pool.get(state, 0) * BAR // total) for state in ("active", "cached"))
    cached = max(0, min(cached, BAR - active))
    bar = Text("█" * active, style="blue")
    bar.append("▒" * cached, style="green")
    return bar.append("·" * (BAR - active - cached), style="dim")


def _numbers(pool: Raw) -> str:
    counts = ", ".join(f"{pool.get(state, 0)} {state}" for state in ("active", "cached", "free"))
    return f" {pool.get('total', 0)} blocks ({pool.get('size', '?')}): {counts}"


def _agents(agents: Sequence[Raw]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  AGENT", no_wrap=True)
    table.add_column("STATE")
    for column in ("RUNNING", "WAITING", "USED", "CACHED", "HITS"):
        table.add_column(column, justify="right")
    table.add_column("NODE", style="dim")
    table.add_column("", style="dim", overflow="fold")
    for agent in agents:
        table.add_row(
            f"  {agent['name']}",
            Text(agent.get("state", ""), style=STATES.get(agent.get("state", ""), "")),
            *(str(agent.get(key, 0)) for key in ("running", "waiting")),
            *(f"{agent.get(key, 0)}%" for key in ("usedPercent", "cachedPercent", "hitPercent")),
            agent.get("node", ""),
            agent.get("message", ""),
        )
    return table


def _moves(moves: Sequence[Raw]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("  MOVE", "KIND", "FROM", "TO", "PHASE", ""):
        table.add_column(column)
    for move in moves:
        spec, status = move["spec"], move.get("status") or {}
        phase, message = status.get("phase", ""), status.get("message", "")
        table.add_row(
            f"  {move['metadata']['name']}",
            spec["kind"],
            spec["from"],
            spec.get("to", ""),
            phase,
            message,
        )
    return table

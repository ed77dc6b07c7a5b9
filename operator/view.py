"""LLMServices as text for a terminal: for ``blockyard status``, ``top`` and ``up``.

It shows what the API server stores (or the local runtime writes) and nothing else, so that it agrees with
every other tool. It must be readable at 80 columns: the longest text is last in its row and wraps below
itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

BAR = 16  # characters
STATES = {"Ready": "green", "Draining": "yellow", "Starting": "cyan", "Pending": "cyan", "Failed": "red"}
NUMBERS = ("RUN", "WAIT", "USED", "CACHED", "HITS")
OTHERS = ("NODE", "FROM", "TO")
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
    if metadata.get("generation", 0) > status.get("observedGeneration", 0):
        head.append("  (not yet seen by the operator)", style="yellow")
    head.append(f"  {status.get('url', '')}", style="dim")
    facts = [_condition(each) for each in status.get("conditions") or ()]
    if scaling := status.get("autoscaling"):
        facts.append(_autoscaling(scaling, spec.get("autoscaling") or {}))
    pools = [
        (f"  {tier}", _bar(pool), _numbers(pool))
        for tier, pool in (status.get("pool") or {}).items()
        if pool.get("total")
    ]
    parts: list[RenderableType] = [head, _rows(facts), _rows(pools)]
    if agents := status.get("agents"):
        parts += [_agents(agents), _messages((each["name"], each) for each in agents)]
    if moves:
        told = ((each["metadata"]["name"], each.get("status") or {}) for each in moves)
        parts += [_moves(moves), _messages(told)]
    parts.append(_rows(_decision(each) for each in (status.get("decisions") or [])[:5]))
    return parts


def _rows(rows: Iterable[Sequence[str | Text]]) -> RenderableType:
    """Rows of equal length, in cells. The last cell of each takes the rest of the line."""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*row)
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table if table.rows else Group()


def _messages(named: Iterable[tuple[str, Raw]]) -> RenderableType:
    return _rows(
        (f"  {name}", Text(each["message"], style="dim")) for name, each in named if each.get("message")
    )


def _condition(condition: Raw) -> tuple[Text, str, Text]:
    good = condition["status"] == ("False" if condition["type"] in QUIET_IF_FALSE else "True")
    words = Text(condition["reason"])
    if condition.get("message"):
        words.append(f": {condition['message']}", style="dim" if good else "")
    return Text(f"  {condition['type']}", style="green" if good else "yellow"), condition["status"], words


def _autoscaling(scaling: Raw, spec: Raw) -> tuple[Text, str, Text]:
    bounds = f"{spec.get('minReplicas', 1)} to {spec.get('maxReplicas', '?')} agents"
    words = Text(f"{bounds}, {scaling['wanted']} wanted: {scaling['reason']}")
    if since := scaling.get("since"):
        words.append(f"; so few are enough since {since[11:19]}", style="dim")
    return Text("  Autoscaling"), "", words


def _decision(decision: Raw) -> tuple[Text, Text]:
    words = f"{decision['action']} {decision['agent']}".rstrip() + f": {decision['reason']}"
    if decision.get("message"):
        words += f", {decision['message']}"
    return Text(f"  {decision['time'][11:19]}", style="dim"), Text(words, style="dim")


def _bar(pool: Raw) -> Text:
    """Active, cached and free blocks to scale; every kind that is there gets at least one character."""
    total = max(1, pool.get("total", 0))
    active, cached = (-(-pool.get(state, 0) * BAR // total) for state in ("active", "cached"))
    cached = max(0, min(cached, BAR - active))
    bar = Text("█" * active, style="blue")
    bar.append("▒" * cached, style="green")
    return bar.append("·" * (BAR - active - cached), style="dim")


def _numbers(pool: Raw) -> str:
    counts = ", ".join(f"{pool.get(state, 0)} {state}" for state in ("active", "cached", "free"))
    return f"{pool.get('size', '?')}: {counts} blocks"


def _table(*columns: str) -> Table:
    """One line a row. Where a line would be too long, names of other objects are cut at their ends."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        side: JustifyMethod = "right" if column in NUMBERS else "left"
        table.add_column(column, justify=side, no_wrap=column not in OTHERS, overflow="ellipsis")
    return table


def _agents(agents: Sequence[Raw]) -> Table:
    table = _table("  AGENT", "STATE", *NUMBERS, "NODE")
    for agent in agents:
        table.add_row(
            f"  {agent['name']}",
            Text(agent.get("state", ""), style=STATES.get(agent.get("state", ""), "")),
            *(str(agent.get(key, 0)) for key in ("running", "waiting")),
            *(f"{agent.get(key, 0)}%" for key in ("usedPercent", "cachedPercent", "hitPercent")),
            Text(agent.get("node", ""), style="dim"),
        )
    return table


def _moves(moves: Sequence[Raw]) -> Table:
    table = _table("  MOVE", "KIND", "FROM", "TO", "PHASE")
    for move in moves:
        spec, status = move["spec"], move.get("status") or {}
        table.add_row(
            f"  {move['metadata']['name']}",
            *(spec["kind"], spec["from"], spec.get("to", ""), status.get("phase", "")),
        )
    return table

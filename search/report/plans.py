"""The plan of a winner or of a link of a chain, as bars and tables for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from search.report import costs
from search.report.figures import method_label
from search.trials import Teacher
from search.units import percent, plain


@dataclass(frozen=True)
class Bar:
    """The width that a plan keeps of one channel group."""

    name: str
    kept: int
    base: int


@dataclass(frozen=True)
class PlanView:
    """A plan made ready to be shown: bars for widths, tables for rows of equal shape, facts for the rest.

    `cost` is the network's cost after it, given only for a link of a chain.
    """

    title: str
    bars: Sequence[Bar] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    facts: Sequence[tuple[str, str]] = ()
    links: Sequence[PlanView] = ()
    cost: str = ""


def plan_view(plan: Mapping[str, Any], teacher: Teacher) -> PlanView:
    """A plan as bars, tables and facts, by the shapes of its choices; a shape not known here becomes a fact.

    Bars come from rows as `methods.network.widths.to_choices` writes them, links from the plans inside a chain's plan.
    """
    bars: list[Bar] = []
    tables: list[tuple[Sequence[str], Sequence[Sequence[str]]]] = []
    facts: list[tuple[str, str]] = []
    links: list[PlanView] = []
    for name, value in plan.get("choices", {}).items():
        rows = value if isinstance(value, list) and value else []
        records = _to_records(name, value)
        if rows and all(_is_width(row) for row in rows):
            bars += [Bar(*row[:3]) for row in rows]
        elif records and all("choices" in record for record in records):
            links += [replace(plan_view(record, teacher), cost=_link_cost(record, teacher)) for record in records]
        elif records:
            columns = list(dict.fromkeys(column for record in records for column in record))
            tables.append((columns, [[plain(record.get(column, "")) for column in columns] for record in records]))
        else:
            facts.append((name, plain(value)))
    facts += [("note", note) for note in plan.get("notes", [])]
    return PlanView(method_label(str(plan.get("method", ""))), bars, tables, facts, links)


def _link_cost(plan: Mapping[str, Any], teacher: Teacher) -> str:
    shares = [f"{percent(plan[cost] / getattr(teacher, cost))} {costs.NAMES[cost]}" for cost in ("macs", "params")]
    return f"leaves {' and '.join(shares)}"


def _is_width(row: object) -> bool:
    """Whether `row` starts with a channel group's name, kept width and base width."""
    if not isinstance(row, list | tuple) or len(row) < 3 or not isinstance(row[0], str):
        return False
    return isinstance(row[1], int) and isinstance(row[2], int) and 0 <= row[1] <= row[2] and row[2] > 0


def _to_records(name: str, value: object) -> list[dict[str, Any]]:
    """`value` as rows with named columns: a list of mappings, a mapping of mappings or of equally long lists."""
    if isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values()):
        return [{name: key, **row} for key, row in value.items()]
    columns: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {}
    if all(isinstance(column, list) for column in columns.values()) and len(set(map(len, columns.values()))) == 1:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
        return [dict(row) for row in value]
    return []

"""Renders docs/reference.md: the CRDs as tables, from the same schemas that the API server gets.

One table per object, with the fields in the order of the models, so that related fields stand together. The
tables of a status show no limits, because only the operator writes a status. An empty column is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .api import INT32

Schema = Mapping[str, Any]

_BEGINNING = """\
# Reference of the custom resources

Every field, as `kubectl explain` shows it, with its limits. How to use them, and what conditions and reasons
mean, is in [operations.md](operations.md); whole manifests are in [examples](../examples). `make crds` writes
this file from `operator/api/`.
"""
_LONGEST_PATTERN = 16
_IMMUTABLE = "self == oldSelf"


def page(definitions: Iterable[Schema]) -> str:
    """The document about some CustomResourceDefinitions."""
    return "\n".join([_BEGINNING, *(line for each in definitions for line in _resource(each))])


def _resource(definition: Schema) -> Iterator[str]:
    names = definition["spec"]["names"]
    (version,) = definition["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    yield f"## {names['kind']}\n"
    yield f"{schema['description']}\n"
    yield f"It is in a namespace, with `apiVersion: {definition['spec']['group']}/{version['name']}`."
    yield f"`kubectl get {names['shortNames'][0]}` shows:\n"
    yield from _table(
        {
            "Column": column["name"],
            "Only with": "`-o wide`" if column.get("priority") else "",
            "Description": column["description"],
            "From": f"`{column['jsonPath'].removeprefix('.')}`",
        }
        for column in version["additionalPrinterColumns"]
    )
    yield from _rules(schema, "")
    for part in ("spec", "status"):
        yield from _object(f"{names['kind']} {part}", schema["properties"][part])


def _object(title: str, schema: Schema) -> Iterator[str]:
    """The section of an object, then those of the objects inside it. ``title``: a kind and a field's path."""
    titles = {
        name: f"{title}.{name}" + "[]" * ("items" in each) for name, each in schema["properties"].items()
    }
    yield f"### {title}\n"
    yield f"{schema['description']}\n"
    yield from _table(
        _field(titles[name], field, required=name in schema.get("required", ()))
        for name, field in schema["properties"].items()
    )
    yield from _rules(schema, title.partition(" ")[2])
    for name, field in schema["properties"].items():
        if _has_section(field):
            yield from _object(titles[name], field.get("items", field))


def _has_section(field: Schema) -> bool:
    return "properties" in field.get("items", field)


def _field(title: str, field: Schema, *, required: bool) -> dict[str, str]:
    name, default = f"`{title.partition(' ')[2]}`", field.get("default")
    if _has_section(field):
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")  # GitHub's anchor of that heading
        name, default = f"[{name}](#{anchor})", None  # its section lists the defaults
    limits = [*(["required"] if required else []), *_limits(field)]
    return {
        "Field": name,
        "Type": _type(field),
        "Default": "" if default is None else _value(default),
        "Limits": ", ".join(limits) if " spec" in title else "",
        "Description": field["description"],
    }


def _type(field: Schema) -> str:
    if "enum" in field:
        return ", ".join(map(_value, field["enum"]))
    for word, inner in (("list", "items"), ("map", "additionalProperties")):
        if inner in field:
            return f"{word} of {_type(field[inner])}s"
    return "time" if field.get("format") == "date-time" else str(field["type"])


def _limits(field: Schema) -> Iterator[str]:
    least, most = field.get("minimum"), field.get("maximum", INT32)
    if least is not None:
        yield f"{least} to {most}" if most < INT32 else f"at least {least}"
    for limit, what in (("maxLength", "characters"), ("maxItems", "items")):
        if limit in field:
            yield f"at most {field[limit]} {what}"
    if 0 < len(pattern := field.get("pattern", "")) <= _LONGEST_PATTERN:
        yield f"`{pattern}`"
    if any(rule["rule"] == _IMMUTABLE for rule in field.get("x-kubernetes-validations", ())):
        yield "immutable"


def _rules(schema: Schema, path: str) -> Iterator[str]:
    """The messages with which the API server refuses an object or a field that breaks a rule, as a list."""
    found = [(rule.get("fieldPath"), rule) for rule in schema.get("x-kubernetes-validations", ())]
    for name, field in schema["properties"].items():
        if not _has_section(field):
            found += [(f".{name}", rule) for rule in field.get("x-kubernetes-validations", ())]
    told = [
        f"- `{path}{field}`: {rule['message']}" if field else f"- {rule['message']}"
        for field, rule in found
        if rule["rule"] != _IMMUTABLE
    ]
    if told:
        yield from ("Rules:\n", *told, "")


def _table(rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
    rows = list(rows)
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    yield _line(columns)
    yield "|---" * len(columns) + "|"
    yield from (_line([row[column] for column in columns]) for row in rows)
    yield ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def _value(value: object) -> str:
    """A value as it is written in a manifest."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else '`""`'

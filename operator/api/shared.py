"""What all custom resources share: the group, quantities, and rules that CEL and Python check alike.

Descriptions and docstrings are what ``kubectl explain`` shows. A rule that can be checked on one object alone
is in ``RULES`` twice: as CEL, with which the API server refuses an invalid object, and as Python, with which
the local runtime, and an operator in a cluster with older CRDs, refuse the same object. A rule that needs the
state of the cluster becomes a condition. No floats: shares are whole percentages, sizes are quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

GROUP = "serving.blockyard.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

LONGEST_NAME = 50  # of an LLMService: names of its objects are up to 9 characters longer, and may have 63
INT32 = 2**31 - 1
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

Percent = Annotated[int, Field(ge=0, le=100)]
Name = Annotated[
    str, StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
Path = Annotated[str, StringConstraints(min_length=2, max_length=512, pattern=r"^/[^:]*$")]
Quantity = Annotated[
    str, StringConstraints(max_length=32, pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?(Ki|Mi|Gi|Ti|k|M|G|T)?$")
]


def bytes_of(quantity: str) -> int:
    """A Quantity in bytes."""
    number = quantity.rstrip("kKMGTi")
    return int(float(number) * _UNITS[quantity[len(number) :]])


def quantity(size: int) -> str:
    """Bytes as a Quantity for people: rounded down to the largest binary unit that leaves two digits."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if size >= 10 * _UNITS[unit]:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


class Rule(NamedTuple):
    """A condition on an object in CEL and in Python, the error message, and the field that it names."""

    cel: str
    holds: Callable[[Any], bool]
    message: str
    field: str

    def schema(self) -> JsonSchemaValue:
        return {"rule": self.cel, "message": self.message, "fieldPath": f".{self.field}"}


def immutable(what: str, allowed: str = "self == oldSelf") -> JsonSchemaValue:
    """A rule on the old and the new value of a field, which only the API server can check."""
    return {"x-kubernetes-validations": [{"rule": allowed, "message": what}]}


class Resource(BaseModel):
    """Base of all models: camelCase in manifests, snake_case here. Unknown fields are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in self.RULES:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message})
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        if cls.RULES:
            found = handler.resolve_ref_schema(schema)
            found["x-kubernetes-validations"] = [rule.schema() for rule in cls.RULES]
        return schema

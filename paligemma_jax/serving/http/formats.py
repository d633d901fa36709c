"""`response_format` and `text.format`: the objects of detect and segment answers as JSON of a wanted schema.

The model does not write JSON: its boxes are put into the form that the schema describes, so the schema must be one that
every answer can fill: an object with one list, of objects with some of the properties in `VALUES`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pydantic

import paligemma_jax as pj
from paligemma_jax.serving.http.bodies import Body
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.tasks.prompts import Prompt
from paligemma_jax.tasks.select import known_score

Size = tuple[int, int]

VALUES: dict[str, tuple[str, Callable[[pj.Detection, Size], Any]]] = {  # property: its type, and what it is
    "label": ("string", lambda item, size: item.label),
    "box": ("array", lambda item, size: [round(v, 2) for v in item.box]),
    "score": ("number", lambda item, size: round(known_score(item), 4)),
    **{
        name: ("number", lambda item, size, i=i: round(min(max(item.box[i] / size[i % 2], 0.0), 1.0), 5))
        for i, name in enumerate(("x_min", "y_min", "x_max", "y_max"))
    },
}
_USUAL = ("label", "box", "score")
_NO_LIMITS = {"title", "description", "$defs", "$schema", "default", "examples", "strict", "additionalProperties"}
_OF_TYPE = {
    "object": {"properties", "required"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"enum"},
    "number": {"minimum", "maximum"},
}
_BOX = 4
_MOST_REFERENCES = 16


class JsonSchema(Body):
    name: str = pydantic.Field(max_length=64)
    description: str = ""
    schema_: dict[str, Any] = pydantic.Field(alias="schema")
    strict: bool = False


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class FlatSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


@dataclasses.dataclass(frozen=True)
class Form:
    """How objects are written: the list's name, the properties of an item, and the labels it may have (None: any)."""

    name: str = "objects"
    properties: tuple[str, ...] = _USUAL
    labels: tuple[str, ...] | None = None

    def write(self, found: Sequence[pj.Detection], size: Size) -> dict[str, Any]:
        """The JSON of objects in a picture of `size`."""
        return {self.name: [{name: VALUES[name][1](item, size) for name in self.properties} for item in found]}


def form_of(format_: Body | None, prompt: Prompt, param: str) -> Form | None:
    """The form that is asked for, None for plain text.

    Raises:
      ApiError: the prompt asks for no objects, or the schema for what no answer has.
    """
    if format_ is None or isinstance(format_, TextFormat):
        return None
    if not prompt.labels:
        raise ApiError(400, f"{param}: only answers to 'detect ...' and 'segment ...' are JSON", param)
    if isinstance(format_, ObjectFormat):
        return Form()
    schema = format_.json_schema if isinstance(format_, SchemaFormat) else format_
    place = f"{param}.json_schema.schema" if isinstance(format_, SchemaFormat) else f"{param}.schema"
    form = _Reader(schema.schema_, place).form()
    if form.labels is not None and not set(prompt.labels) <= set(form.labels):
        raise ApiError(400, f"{place}: the prompt asks for labels that its enum has not", place)
    return form


class _Reader:
    """A schema that is read from its root."""

    def __init__(self, root: dict[str, Any], place: str):
        self._root, self._place = root, place

    def form(self) -> Form:
        properties = self._properties(self._root, "the root")
        if len(properties) != 1:
            raise self._refused("the root needs one property, the list of objects")
        [(name, value)] = properties.items()
        items = self._typed(value, "array", name, {"items"}).get("items", {})
        fields = self._properties(items, f"an item of {name}")
        labels: tuple[str, ...] | None = None
        for field, schema in fields.items():
            if field not in VALUES:
                raise self._refused(f"an item cannot have {field!r:.60}, only {', '.join(VALUES)}")
            known = self._typed(schema, VALUES[field][0], field)
            if field == "box":
                self._check_box(known)
            elif field == "label" and "enum" in known:
                labels = tuple(label for label in known["enum"] if isinstance(label, str))
            elif {"minimum", "maximum"} & set(known) and (known.get("minimum", 0) > 0 or known.get("maximum", 1) < 1):
                raise self._refused(f"{field!r} is a number from 0 to 1, which its limits do not let pass")
        return Form(name, tuple(fields) or _USUAL, labels)

    def _properties(self, schema: Any, what: str) -> Mapping[str, Any]:
        properties = self._typed(schema, "object", what).get("properties", {})
        if not isinstance(properties, dict):
            raise self._refused(f"properties of {what} are no object")
        return properties

    def _check_box(self, schema: Mapping[str, Any]) -> None:
        if schema.get("minItems", _BOX) > _BOX or schema.get("maxItems", _BOX) < _BOX:
            raise self._refused("a box has four numbers: x0, y0, x1, y1")
        sides = schema.get("prefixItems", [schema.get("items", {"type": "number"})])
        if not isinstance(sides, list) or (len(sides) != _BOX and "prefixItems" in schema):
            raise self._refused("a box has four numbers: x0, y0, x1, y1")
        for side in sides:
            if side is not False:
                self._typed(side, "number", "a side of a box", set())

    def _typed(self, schema: Any, kind: str, what: str, known: set[str] | None = None) -> Mapping[str, Any]:
        """A schema without references, whose values are of a type, perhaps among others."""
        for _ in range(_MOST_REFERENCES):
            if not isinstance(schema, dict):
                raise self._refused(f"the schema of {what!r:.60} is no object")
            if isinstance(name := schema.get("$ref"), str):
                definitions = self._root.get("$defs")
                key = name.removeprefix("#/$defs/")
                schema = definitions.get(key) if isinstance(definitions, dict) else None
            elif isinstance(branches := schema.get("anyOf"), list):
                kinds = [branch for branch in branches if not isinstance(branch, dict) or branch.get("type") != "null"]
                schema = kinds[0] if len(kinds) == 1 else None
            else:
                break
        else:
            raise self._refused("its references lead nowhere")
        given = schema.get("type", kind)
        if kind not in (given if isinstance(given, list) else [given]):
            raise self._refused(f"{what!r:.60} is of type {kind}")
        strange = set(schema) - {"type"} - _NO_LIMITS - (_OF_TYPE[kind] if known is None else known)
        if strange:
            raise self._refused(f"{min(map(str, strange))!r:.60} is not supported for {what!r:.60}")
        limits = {"minItems": int, "maxItems": int, "minimum": (int, float), "maximum": (int, float), "enum": list}
        if any(key in schema and not isinstance(schema[key], types) for key, types in limits.items()):
            raise self._refused(f"the limits of {what!r:.60} are of another type")
        return schema

    def _refused(self, message: str) -> ApiError:
        return ApiError(400, f"{self._place}: {message}", self._place, "unsupported_schema")

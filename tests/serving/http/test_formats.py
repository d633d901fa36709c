"""Schemas that answers can fill, and those that they cannot."""

import pydantic
import pytest

from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.formats import Form, SchemaFormat, form_of
from paligemma_jax.tasks.prompts import read_prompt


def form(schema, prompt="detect cat"):
    format_ = SchemaFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    return form_of(format_, read_prompt(prompt), "response_format")


def of_item(item):
    return {"type": "object", "properties": {"objects": {"type": "array", "items": item}}}


def of(**properties):
    return of_item({"type": "object", "properties": properties})


class Found(pydantic.BaseModel):
    label: str
    box: list[float]
    score: float | None


class Corners(pydantic.BaseModel):
    box: tuple[float, float, float, float]
    x_min: float = pydantic.Field(ge=0, le=1)


class Answer(pydantic.BaseModel):
    things: list[Found]


class Cornered(pydantic.BaseModel):
    things: list[Corners]


@pytest.mark.parametrize(
    "schema, expected",
    [
        (Answer.model_json_schema(), Form("things", ("label", "box", "score"))),
        (Cornered.model_json_schema(), Form("things", ("box", "x_min"))),
        (of(label={"type": "string", "enum": ["cat", "dog"]}), Form("objects", ("label",), ("cat", "dog"))),
        (of(x_min={"type": "number"}, y_max={}), Form("objects", ("x_min", "y_max"))),
        (
            of(box={"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}),
            Form("objects", ("box",)),
        ),
        (of_item({"type": "object"}), Form()),
    ],
)
def test_what_a_schema_asks_for(schema, expected):
    assert form(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "array"},
        {"type": "object", "properties": {}},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "array"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}},
        of(colour={"type": "string"}),
        of(label={"type": "number"}),
        of(label={"type": "string", "pattern": "^c"}),
        of(label={"type": "string", "enum": ["dog"]}),
        of(label={"type": "string", "enum": "cat"}),
        of(box={"type": "array", "minItems": 5}),
        of(box={"type": "array", "minItems": "5"}),
        of(box={"type": "array", "items": {"type": "string"}}),
        of(box={"type": "array", "prefixItems": [{"type": "number"}]}),
        of(score={"type": "number", "minimum": 0.5}),
        of(score={"type": "number", "minimum": None}),
        of(score={"$ref": "#/$defs/none"}),
        of(score=None),
        of_item([]),
        of_item({"type": "object", "minProperties": 1}),
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/a", "$defs": []},
        {"anyOf": [{"type": "object"}, {"type": "array"}]},
    ],
)
def test_other_schemas_are_refused(schema):
    with pytest.raises(ApiError) as caught:
        form(schema)
    assert caught.value.status == 400 and caught.value.param == "response_format.json_schema.schema"

"""The signature table: every field, nested or not, from whatever has a signature.

Run: python -m helpers test tests/unit/helpers/test_signatures.py
"""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from mlflow.types.schema import (
    AnyType,
    Array,
    ColSpec,
    DataType,
    Map,
    Object,
    ParamSchema,
    ParamSpec,
    Property,
    Schema,
    TensorSpec,
)
from support import refuses

from helpers import compare_signatures, show_signature, show_table


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_database):
    """Return the URI of one store for this module."""
    return (
        "sqlite:///"
        + Path(shutil.copy(empty_database, tmp_path_factory.mktemp("store"))).as_posix()
    )


def rows(table):
    return {
        (part, field): (kind, required, default)
        for field, part, kind, required, default in table.rows
    }


def test_every_nested_field_has_a_row_with_its_type_and_whether_it_is_required():
    example = {"items": [{"name": "a", "sizes": [1, 2], "inner": {"deep": True}}], "note": "x"}
    table = rows(
        show_signature(infer_signature(example, ["text"], params={"k": 3, "stops": ["a"]}))
    )
    assert table == {
        ("input", "items"): ("list of object", "required", ""),
        ("input", "items[].name"): ("string", "required", ""),
        ("input", "items[].sizes"): ("list of long", "required", ""),
        ("input", "items[].inner"): ("object", "required", ""),
        ("input", "items[].inner.deep"): ("boolean", "required", ""),
        ("input", "note"): ("string", "required", ""),
        ("output", "(unnamed)"): ("string", "required", ""),
        ("parameter", "k"): ("long", "optional", "3"),
        ("parameter", "stops"): ("list of string", "optional", "['a']"),
    }


def test_the_chat_contract_is_shown_down_to_its_last_field():
    table = show_signature(ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA))
    fields = rows(table)
    assert fields["input", "messages[].role"] == ("string", "required", "")
    assert fields["input", "messages[].content"] == ("string", "optional", "")
    assert fields["output", "choices[].message.content"][0] == "string"
    assert fields["output", "usage.total_tokens"] == ("long", "required", "")
    shown = {field.split(".")[-1].rstrip("[]{}") for _, field in fields}
    assert property_names(json.loads(CHAT_MODEL_INPUT_SCHEMA.to_json())) <= shown


def property_names(schema):
    """Return the names of all fields of a schema's JSON, at any depth."""
    if isinstance(schema, list):
        return set().union(*map(property_names, schema))
    if not isinstance(schema, dict):
        return set()
    named = set(schema.get("properties", {})) | (
        {schema["name"]} if isinstance(schema.get("name"), str) else set()
    )
    below = [value for key, value in schema.items() if key != "properties"]
    return named.union(*map(property_names, below + list(schema.get("properties", {}).values())))


def test_two_signatures_stand_side_by_side():
    chat = ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA)
    prompt = infer_signature({"prompt": "x", "n": "y"}, {"id": "z"}, params={"max_tokens": 64})
    table = compare_signatures(chat, prompt, names=("chat", "prompt"))
    assert table.columns == ("Field", "Part", "chat", "prompt")
    fields = {(part, field): cells for field, part, *cells in table.rows}
    assert fields["input", "messages"] == ["list of object, required", "-"]
    assert fields["input", "n"] == ["long, optional", "string, required"]
    assert fields["input", "prompt"] == ["-", "string, required"]
    assert fields["output", "id"] == ["string, required", "string, required"]
    assert fields["parameter", "max_tokens"] == ["-", "long, optional (64)"]
    assert len(fields) == len(table.rows)
    assert {(part, field) for field, part, *_ in show_signature(chat).rows} <= set(fields)
    parts = [part for _, part, *_ in table.rows]
    assert parts == sorted(parts, key=("input", "output", "parameter").index)
    assert table.rows[0] == ("messages", "input", "list of object, required", "-")
    assert fields["input", "n"] == ["long, optional", "string, required"]
    assert table.caption == "Two signatures"
    assert compare_signatures(chat, prompt).columns == ("Field", "Part", "first", "second")
    for pair in ((chat, None), (None, chat)):
        with refuses("signature-absent"):
            compare_signatures(*pair)


def test_tensors_tables_and_optional_columns_are_shown():
    tensor = rows(
        show_signature(infer_signature({"pixels": np.zeros((2, 3), np.float32)}, np.zeros(2)))
    )
    assert tensor["input", "pixels"] == ("tensor of float32, shape (-1, 3)", "required", "")
    frame = rows(show_signature(infer_signature(pd.DataFrame({"a": ["x", None], "b": [1.5, 2.5]}))))
    assert frame["input", "a"] == ("string", "optional", "")
    assert frame["input", "b"] == ("double", "required", "")


def test_maps_lists_and_any_type_are_told_apart_at_any_depth():
    inner = Object([Property("x", DataType.double), Property("y", AnyType(), required=False)])
    table = rows(
        show_signature(
            ModelSignature(
                inputs=Schema(
                    [
                        ColSpec(Map(DataType.string), "tags"),
                        ColSpec(Array(Map(Array(inner))), "deep"),
                        ColSpec(AnyType(), "anything", required=False),
                    ]
                ),
                params=ParamSchema(
                    [
                        ParamSpec("shape", DataType.long, [1, 2], (-1,)),
                        ParamSpec("box", Object([Property("side", DataType.long)]), {"side": 1}),
                    ]
                ),
            )
        )
    )
    assert table == {
        ("input", "tags"): ("map of string to string", "required", ""),
        ("input", "deep"): ("list of map of string to list of object", "required", ""),
        ("input", "deep[]{}[].x"): ("double", "required", ""),
        ("input", "deep[]{}[].y"): ("any", "optional", ""),
        ("input", "anything"): ("any", "optional", ""),
        ("parameter", "shape"): ("list of long", "optional", "[1, 2]"),
        ("parameter", "box"): ("object", "optional", "{'side': 1}"),
        ("parameter", "box.side"): ("long", "required", ""),
    }


def test_nameless_columns_stay_apart():
    two = ModelSignature(
        inputs=Schema([ColSpec("string"), ColSpec("long")]),
        outputs=Schema([ColSpec("string"), ColSpec("double")]),
    )
    table = show_signature(two).rows
    assert [(field, part, kind) for field, part, kind, *_ in table] == [
        ("0", "input", "string"),
        ("1", "input", "long"),
        ("0", "output", "string"),
        ("1", "output", "double"),
    ]
    assert len(compare_signatures(two, two).rows) == 4
    (one,) = show_signature(
        ModelSignature(inputs=Schema([TensorSpec(np.dtype("int8"), (-1,))]))
    ).rows
    assert one == ("0", "input", "tensor of int8, shape (-1,)", "required", "")
    # An object that is the whole answer has fields, and no name in front of them.
    whole = ModelSignature(inputs=Schema([ColSpec(Object([Property("deep", DataType.string)]))]))
    assert [row[0] for row in show_signature(whole).rows] == ["(unnamed)", "deep"]
    (one,) = show_signature(ModelSignature(inputs=Schema([ColSpec("string")]))).rows
    assert one == ("(unnamed)", "input", "string", "required", "")


def test_a_signature_without_outputs_or_parameters_is_no_error():
    table = show_signature(infer_signature({"a": "x"}))
    assert (table.caption, table.columns, len(table.rows)) == (
        "Signature",
        ("Field", "Part", "Type", "Required", "Default"),
        1,
    )


def test_the_html_has_a_caption_and_header_scopes_and_escapes_what_it_shows():
    table = show_table("A <caption>", {"<b>key</b>": '1 < 2 & "3"'}, ("one", "two"))
    html = table._repr_html_()
    assert "<caption" in html
    assert "A &lt;caption&gt;" in html
    assert html.count('scope="col"') == 2
    assert html.count('scope="row"') == 1
    assert "<b>key" not in html
    assert "1 &lt; 2 &amp;" in html


def test_a_table_of_keys_and_values_has_no_empty_headings():
    table = show_table("Facts", {"a": 1, "longer": "two"})
    assert "<thead" not in table._repr_html_()
    assert repr(table) == "Facts\n\na       1\nlonger  two"
    assert show_table("Nothing", {})._repr_html_().count("<tr>") == 0
    assert repr(show_table("Nothing", {})) == "Nothing\n"


def test_the_text_says_the_same_as_the_html():
    table = show_signature(infer_signature({"prompt": "x"}, "y", params={"n": 1}))
    for line in table.rows:
        assert all(cell in repr(table) and cell in table._repr_html_() for cell in line)


def test_model_info_loaded_model_and_uri_show_the_same(tmp_path, store):
    code = tmp_path / "echo.py"
    code.write_text(
        "import mlflow, pandas as pd\n"
        "class Echo(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input: pd.DataFrame, params=None):\n"
        "        return list(model_input['text'])\n"
        "mlflow.models.set_model(Echo())\n",
        encoding="utf-8",
    )
    mlflow.set_tracking_uri(store)
    mlflow.create_experiment("echo", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment("echo")
    info = mlflow.pyfunc.log_model(
        name="echo",
        python_model=str(code),
        pip_requirements=["mlflow"],
        signature=infer_signature({"text": "a"}, "a"),
    )
    tables = [
        show_signature(source).rows
        for source in (
            info,
            info.signature,
            info.model_uri,
            mlflow.pyfunc.load_model(info.model_uri),
        )
    ]
    assert all(table == tables[0] for table in tables)
    assert tables[0][0][0] == "text"

    unsigned = mlflow.pyfunc.log_model(
        name="unsigned", python_model=str(code), pip_requirements=["mlflow"]
    )
    for source in (unsigned, unsigned.model_uri, mlflow.pyfunc.load_model(unsigned.model_uri)):
        with refuses("signature-absent"):
            show_signature(source)


def test_a_uri_without_a_model_is_refused(store):
    mlflow.set_tracking_uri(store)
    for uri in ("models:/nobody@champion", "models:/m-0123", "runs:/0/x", "no such folder"):
        with refuses("model-absent") as refusal:
            show_signature(uri)
        assert repr(uri) in refusal.value.what


@pytest.mark.parametrize("nonsense", [None, 5, {"a": 1}, object()])
def test_what_is_no_model_is_refused(nonsense):
    with refuses("signature-absent") as refusal:
        show_signature(nonsense)
    assert type(nonsense).__name__ in refusal.value.what

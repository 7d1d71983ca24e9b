"""The exercises: each check passes its solution, and says what to look at for what learners write instead.

Run: python -m helpers test tests/unit/helpers/test_exercises.py
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import nbformat
import pytest
from mlflow.models import ModelSignature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from support import NAMES, ROOT, refuses

from course.exercises import make_exercise, pair, solve, write_exercises
from helpers import check
from helpers.exercises import find_hint, load_checks
from serving import chat as chat_model

# The exercises of each page in the page's order.
ORDER = {
    "TransformerPipeline": ("warm pipeline", "request", "alias"),
    "CustomPythonWrapper": ("warm engine", "signature", "alias"),
    "ChatModel": ("seed", "pieces", "schema", "steps", "settings"),
    "Operations": (
        "roll back",
        "scorer",
        "failed calls",
        "stream usage",
        "outside the band",
        "retry",
    ),
    "Cloud": ("reasons", "estimate", "size", "copies"),
}
CALLS = {}  # what the operations page knows of the calls that it traced


PET = {
    "type": "object",
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
    },
}


class Registry:
    """The two calls of a client that the exercises make, on a dict of aliases."""

    def __init__(self, **aliases):
        self.aliases = aliases

    def set_registered_model_alias(self, name, alias, version):
        self.aliases[alias] = version

    def get_model_version_by_alias(self, name, alias):
        if alias not in self.aliases:
            raise mlflow.MlflowException(f"Registered model alias {alias} not found.")
        return SimpleNamespace(version=self.aliases[alias])


@pytest.fixture(scope="module", autouse=True)
def calls(tmp_path_factory, empty_database):
    """Trace a call that went well and one that failed, as the operations page does."""
    database = shutil.copy(empty_database, tmp_path_factory.mktemp("calls"))
    mlflow.set_tracking_uri("sqlite:///" + Path(database).as_posix())
    experiment = mlflow.set_experiment("calls")
    mlflow.tracing.reset()
    for state in ("OK", "ERROR"):
        with mlflow.start_span("chat") as span:
            span.set_status(state)
        mlflow.get_trace(span.trace_id, flush=True)
    CALLS.update(experiment=experiment, refused=span.trace_id)


def page_names(page="TransformerPipeline", **more):
    """Return what a page has bound where its exercises stand."""
    signature = ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA)
    return (
        {
            "mlflow": mlflow,
            "prompt": "Hello",
            "max_tokens": 64,
            "chat_model": chat_model,
            "client": Registry(),
            "lengths": [30, 5, 5, 20, 10, 10],
            "slots": 3,
            "model_info": SimpleNamespace(signature=signature),
            "version": SimpleNamespace(name=NAMES.get(page), version=2),
        }
        | CALLS
        | more
    )


def run(source, names):
    exec(source, names)
    return names


def cells(page):
    return pair(nbformat.read(ROOT / "notebooks" / f"{page}.ipynb", as_version=4))


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page, names in ORDER.items() for number in range(len(names))],
)
def test_a_check_passes_the_solution_and_not_the_untouched_cell(page, number, capsys):
    exercise, solution = cells(page)[number]
    name = ORDER[page][number]
    assert check(name, run(solution, page_names(page)))
    assert capsys.readouterr().out == "PASS\n"
    assert not check(name, run(exercise.source, page_names(page)))
    said = capsys.readouterr().out
    assert said.startswith("Not yet: ") and said.endswith(".\n")
    assert not check(name, page_names(page))  # the cell was not run at all
    assert "there is no" in capsys.readouterr().out or name == "alias"


# What a learner wrote, and a word of the hint.
@pytest.mark.parametrize(
    ("name", "wrote", "says"),
    [
        ("warm pipeline", "warm = {'temperature': 1.0, 'max_new_tokens': 24}", "do_sample=True"),
        (
            "warm pipeline",
            "warm = {'do_sample': False, 'temperature': 1.0, 'max_new_tokens': 24}",
            "do_sample=True",
        ),
        (
            "warm pipeline",
            "warm = {'do_sample': True, 'temperature': 1.0, 'max_tokens': 24}",
            "max_tokens is no setting",
        ),
        (
            "warm pipeline",
            "warm = {'do_sample': True, 'temperature': 0, 'max_new_tokens': 24}",
            "above 0",
        ),
        (
            "warm pipeline",
            "warm = {'do_sample': True, 'temperature': '1', 'max_new_tokens': 24}",
            "above 0",
        ),
        (
            "warm pipeline",
            "warm = {'do_sample': True, 'temperature': 1.0, 'max_new_tokens': 0}",
            "max_new_tokens is a",
        ),
        (
            "warm pipeline",
            "warm = {'do_sample': True, 'temperature': 1.0, 'max_new_tokens': 2.5}",
            "whole number",
        ),
        (
            "warm pipeline",
            "warm = {'do_sample': True, 'temperature': 1.0, 'top_p': 2, 'max_new_tokens': 9}",
            "top_p is a",
        ),
        ("warm pipeline", "warm = {'do_sample': True, 'temperature': 1.0}", "how long"),
        ("warm pipeline", "warm = True", "a dict"),
        ("warm pipeline", "warm = {True, 1.0}", "a dict"),
        (
            "warm engine",
            "warm = {'do_sample': True, 'temperature': 1.0, 'top_k': 5000}",
            "top_k is a",
        ),
        ("warm engine", "warm = {'temperature': 1.0}", "do_sample=True"),
        ("warm engine", "warm = {'do_sample': True, 'temp': 1.0}", "temp is no setting"),
        (
            "warm engine",
            "warm = {'do_sample': True, 'max_new_tokens': 5}",
            "max_new_tokens is no setting",
        ),
        ("warm engine", "warm = {'do_sample': 1, 'temperature': 1.0}", "do_sample=True"),
        ("warm engine", "warm = {'do_sample': True, 'temperature': float('nan')}", "above 0"),
        ("request", "request = 'What is the capital of France?'", "a dict"),
        (
            "request",
            "request = {'messages': 'The capital of France?', 'max_tokens': 12, 'stop': ['.']}",
            "list",
        ),
        (
            "request",
            "request = {'messages': [{'content': 'France?'}], 'max_tokens': 12, 'stop': ['.']}",
            "role",
        ),
        (
            "request",
            "request = {'messages': [{'role': 'user', 'content': 'France?'}], 'max_new_tokens': 12}",
            "no field max_new_tokens",
        ),
        (
            "request",
            "request = {'messages': [{'role': 'user', 'content': 'France?'}], 'max_tokens': 12, 'stop': '.'}",
            "list",
        ),
        (
            "request",
            "request = {'messages': [{'role': 'user', 'content': 'France?'}], 'max_tokens': 12}",
            "full stop",
        ),
        (
            "request",
            "request = {'messages': [{'role': 'user', 'content': 'France?'}], 'max_tokens': 120, 'stop': ['.']}",
            "12 tokens",
        ),
        (
            "request",
            "request = {'messages': [{'role': 'user', 'content': 'Spain?'}], 'max_tokens': 12, 'stop': ['.']}",
            "capital of France",
        ),
        ("request", "request = {'messages': [], 'max_tokens': 12, 'stop': ['.']}", "IndexError"),
        (
            "request",
            "request = {'messages': [{'role': 'system', 'content': 'France'}], 'stop': ['.']}",
            "the user's",
        ),
        (
            "request",
            "request = {'messages': [{'role': 'user', 'content': 'France?'}], 'max_tokens': 12, 'stop': ['.'], "
            "'n': 2}",
            "leave n out",
        ),
        ("request", "request = {'max_tokens': 12, 'stop': ['.']}", "messages"),
        (
            "signature",
            "wider = mlflow.models.infer_signature({'prompt': 'a'}, 'b', params={'top_p': 1.0})",
            "max_tokens",
        ),
        (
            "signature",
            "wider = {'max_tokens': 64, 'temperature': 0.0, 'top_p': 1.0}",
            "a ModelSignature",
        ),
        (
            "signature",
            "wider = mlflow.models.infer_signature({'prompt': 'a', 'top_p': 1.0}, 'b')",
            "params=",
        ),
        (
            "signature",
            "wider = mlflow.models.infer_signature({'prompt': 'a'}, 'b')",
            "lack max_tokens",
        ),
        (
            "signature",
            "wider = mlflow.models.infer_signature({'prompt': 'a'}, 'b', params={'max_tokens': 64, "
            "'temperature': 0.0, 'top_p': 1})",
            "0.9 would be refused",
        ),
        (
            "signature",
            "wider = mlflow.models.infer_signature({'prompt': 'a'}, 'b', params={'max_tokens': 64, "
            "'temperature': 0.0, 'top_p': 0.5})",
            "changes nothing",
        ),
        (
            "signature",
            "wider = mlflow.models.infer_signature('a', 'b', params={'top_p': 1.0})",
            "one prompt",
        ),
        ("alias", "my_uri = 'models:/slm-transformers/mine'", "@ALIAS"),
        ("alias", "my_uri = 'models:/slm-transformers@champion'", "the alias is mine"),
        ("alias", "my_uri = 'models:/slm-transformers@mine'", "set_registered_model_alias"),
        (
            "alias",
            "my_uri = 'models:/slm-transformers@mine'; client.set_registered_model_alias('x', 'mine', 1)",
            "Move it",
        ),
        ("alias", "my_uri = version", "models:/NAME"),
        ("seed", "seeded = {'seed': 7}", "Set a temperature first"),
        ("seed", "seeded = {'temperature': 1.0}", "only with a seed"),
        ("seed", "seeded = {'temperature': 1.0, 'seed': '7'}", "seed has to be"),
        ("seed", "seeded = {'temperature': 3, 'seed': 7}", "temperature has to be"),
        ("seed", "seeded = {'temperature': 1.0, 'random_state': 7}", "not served"),
        ("seed", "seeded = {'temperature': 1.0, 'seed': 7, 'stream': True}", "leave stream out"),
        ("seed", "seeded = 7", "a dict"),
        (
            "pieces",
            "def read_piece(chunk):\n    return chunk['choices'][0]['delta']['content']",
            "KeyError",
        ),
        (
            "pieces",
            "def read_piece(chunk):\n    return chunk['choices'][0]['message']['content']",
            "KeyError",
        ),
        (
            "pieces",
            "def read_piece(chunk):\n    return chunk['choices'][0]['delta']",
            "of the type dict",
        ),
        (
            "pieces",
            "def read_piece(chunk):\n    return chunk['choices'][0]['delta'].get('content')",
            "an empty text",
        ),
        ("pieces", "def read_piece(chunk):\n    return str(chunk)", "the delta's content"),
        ("pieces", "read_piece = 'Ma'", "TypeError"),
        ("steps", "static_steps = 80; joining_steps = 30", "takes as many steps as its longest"),
        ("steps", "static_steps = 30; joining_steps = 30", "only then the next three begin"),
        ("steps", "static_steps = 50; joining_steps = 50", "free first"),
        ("steps", "static_steps = 50; joining_steps = 27", "free first"),
        ("schema", "pet = {'name': 'Tom', 'kind': 'cat', 'age': 3}", "a pet without name"),
        ("schema", "pet = {'type': 'objekt'}", "SchemaError"),
        ("schema", "pet = {'type': 'object', 'not': {}}", "can't keep this schema"),
        ("schema", "pet = 'object'", "a dict that begins with"),
        ("schema", f"pet = {PET}; pet['required'].remove('kind')", "a pet without kind"),
        (
            "schema",
            f"pet = {PET}; pet['properties']['name'].pop('maxLength')",
            "whose name is 'xxx",
        ),
        (
            "schema",
            f"pet = {PET}; pet['properties']['kind']['enum'] += ['horse']",
            "whose kind is 'horse'",
        ),
        ("schema", f"pet = {PET}; pet['properties']['age']['type'] = 'number'", "whose age is 2.5"),
        ("schema", f"pet = {PET}; pet['properties']['age']['minimum'] = 1", "a dog of 0"),
        ("schema", f"pet = {PET}; pet['additionalProperties'] = True", "other names fit"),
        (
            "settings",
            "changes = {'max_new_tokens': 8, 'model': 'mine'}",
            "max_new_tokens is no setting",
        ),
        (
            "settings",
            "changes = {'max_tokens_limit': 8, 'model': 'mine'}",
            "that setting is max_tokens",
        ),
        ("settings", "changes = {'max_tokens': 8}", "a name of your own"),
        ("settings", "changes = {'max_tokens': '8', 'model': 'mine'}", "ValidationError"),
        (
            "settings",
            "changes = {'max_tokens': 8, 'model': 'mine', 'threads': 900}",
            "leave threads out",
        ),
        ("settings", "changes = 8", "a dict"),
        (
            "roll back",
            "def find_former(champion):\n    return str(int(champion.version) - 1)",
            "read the tag",
        ),
        (
            "roll back",
            "def find_former(champion):\n    return champion.tags['replaced']",
            "KeyError",
        ),
        (
            "roll back",
            "def find_former(champion):\n    return champion.tags",
            "The tag is called replaced",
        ),
        (
            "roll back",
            "def find_former(champion):\n    return champion.tags.get('replaced', '1')",
            "return None",
        ),
        (
            "scorer",
            "def ends_well(outputs):\n    return outputs['answer'].endswith(('.', '!', '?'))",
            "strip it first",
        ),
        (
            "scorer",
            "def ends_well(outputs):\n    return outputs['answer'].strip()[-1:] == '.'",
            "'Is it? Yes!'",
        ),
        (
            "scorer",
            "def ends_well(outputs):\n    return outputs['answer'].strip()[-1:] in list('.!?')",
            "KeyError",
        ),
        (
            "scorer",
            "def ends_well(outputs):\n    return 'refused' not in outputs",
            "it has to be False",
        ),
        ("failed calls", "failures = 7", "a filter is text"),
        ("failed calls", "failures = 'status is bad'", "can't read this filter"),
        ("failed calls", "failures = \"trace.name = 'chat'\"", "that went well, too"),
        ("failed calls", "failures = \"trace.name = 'other'\"", "doesn't find the call"),
        (
            "stream usage",
            "def read_stream(chunks):\n    return chunks[-1].choices[0].delta.content, 2",
            "IndexError",
        ),
        ("stream usage", "def read_stream(chunks):\n    return 'Madrid'", "two things"),
        ("stream usage", "def read_stream(chunks):\n    return 'Mad', 2", "whole text is 'Madrid'"),
        (
            "stream usage",
            "def read_stream(chunks):\n    return 'Madrid', chunks[-1].usage.total_tokens",
            "yours are 11",
        ),
        (
            "outside the band",
            "def find_outside(values, low, high):\n    return [9]",
            "yours are [9]",
        ),
        (
            "outside the band",
            "def find_outside(values, low, high):\n    return [4]",
            "below the band",
        ),
        (
            "outside the band",
            "def find_outside(values, low, high):\n    return [1, 3]",
            "counted from 1",
        ),
        (
            "outside the band",
            "def find_outside(values, low, high):\n    return [2, 3, 4, 5]",
            "on the line is inside",
        ),
        (
            "outside the band",
            "def find_outside(values, low, high):\n    return {2, 4}",
            "of the type set",
        ),
        (
            "retry",
            "def pause(status, headers):\n    return headers.get('retry-after', 1)",
            "header is text",
        ),
        (
            "retry",
            "def pause(status, headers):\n    return float(headers['retry-after'])",
            "KeyError",
        ),
        (
            "retry",
            "def pause(status, headers):\n    return float(headers.get('retry-after', 1))",
            "asks for None",
        ),
        (
            "reasons",
            "def count_reasons(rows):\n    return rows.reason.value_counts().to_dict()",
            "good rows are not in it",
        ),
        (
            "reasons",
            "def count_reasons(rows):\n    return rows[rows.status == 'error'].reason.value_counts()",
            "to_dict()",
        ),
        (
            "reasons",
            "def count_reasons(rows):\n    return {'empty': 1, 'too long': 1}",
            "yours is {'empty': 1",
        ),
        (
            "reasons",
            "def count_reasons(rows):\n    return {'empty': 2, 'too long': 1}",
            "a table of good rows",
        ),
        (
            "estimate",
            "def estimate(rows, row_seconds, start_seconds, executors):\n"
            "    return (start_seconds + rows * row_seconds) / executors",
            "the start is not divided",
        ),
        (
            "estimate",
            "def estimate(rows, row_seconds, start_seconds, executors):\n"
            "    return start_seconds + rows * row_seconds",
            "divide by how many",
        ),
        (
            "estimate",
            "def estimate(rows, row_seconds, start_seconds, executors):\n"
            "    return rows * row_seconds / executors",
            "start first",
        ),
        (
            "estimate",
            "def estimate(rows, row_seconds, start_seconds, executors):\n    return 7",
            "yours says 7",
        ),
        (
            "estimate",
            "def estimate(rows, row_seconds, start_seconds, executors):\n    return '70'",
            "the type str",
        ),
        (
            "size",
            "def choose_size(times, most):\n    return min(size for size in times if times[size] <= most)",
            "the smallest",
        ),
        (
            "size",
            "def choose_size(times, most):\n    return max(size for size in times if times[size] < most)",
            "at the bound",
        ),
        ("size", "def choose_size(times, most):\n    return max(times)", "4 times the estimate"),
        (
            "size",
            "def choose_size(times, most):\n    return max(size for size in times if times[size] <= most)",
            "default=None",
        ),
        (
            "size",
            "def choose_size(times, most):\n"
            "    return max((size for size in times if times[size] <= most), default=0)",
            "yours is 0",
        ),
        (
            "size",
            "def choose_size(times, most):\n    return [size for size in times if times[size] <= most][-1:][0]",
            "IndexError",
        ),
        (
            "copies",
            "def count_copies(waiting, target, least, most):\n    return waiting // target",
            "round up",
        ),
        (
            "copies",
            "def count_copies(waiting, target, least, most):\n    return waiting / target",
            "whole number",
        ),
        (
            "copies",
            "def count_copies(waiting, target, least, most):\n    return -(-waiting // target)",
            "that is 2",
        ),
        (
            "copies",
            "def count_copies(waiting, target, least, most):\n    return max(-(-waiting // target), least)",
            "that is 10",
        ),
    ],
)
def test_a_check_says_what_to_look_at(name, wrote, says, capsys):
    assert not check(name, run(wrote, page_names()))
    said = capsys.readouterr().out
    assert said.startswith("Not yet: ")
    assert says in said


def test_every_exercise_has_three_wrong_answers_in_the_table_above():
    (table,) = [mark.args[1] for mark in test_a_check_says_what_to_look_at.pytestmark]
    assert all(sum(row[0] == name for row in table) >= 3 for name in load_checks())
    assert {name for names in ORDER.values() for name in names} <= set(load_checks())


def test_other_right_answers_pass_too():
    right = {
        # A temperature of 1.0 is the default.
        "warm pipeline": "warm = {'do_sample': True, 'max_new_tokens': 24}",
        "warm engine": "warm = {'do_sample': True, 'temperature': 0.7, 'top_k': 40, 'top_p': 0.9}",
        "request": "request = {'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': "
        "'The capital of France?'}], 'max_tokens': 12, 'stop': ['.'], 'temperature': 0.5}",
        "seed": "seeded = {'temperature': 0.8, 'seed': 0, 'top_p': 0.9}",
        "schema": f"pet = {PET}; pet['properties']['kind'] = {{'anyOf': [{{'const': 'cat'}}, {{'const': 'dog'}}]}}",
        "settings": "changes = {'max_tokens': 8, 'model': 'mine', 'temperature': 0.5}",
    }
    for name, wrote in right.items():
        assert find_hint(name, run(wrote, page_names())) is None, name


@pytest.mark.parametrize(
    ("solution", "exercise"),
    [
        ("warm = {1: 2}  # your turn", "warm = ...  # your turn"),
        ("warm = {1: 2}", "warm = {1: 2}"),
        (
            "warm = {  # your turn\n    1: 2,\n}\nprint(warm)",
            "warm = ...  # your turn\nprint(warm)",
        ),
        ("x = 1  # your turn\ny = f(x)  # your turn", "x = ...  # your turn\ny = ...  # your turn"),
        ("client.set('é', 1)  # your turn", "...  # your turn"),
        ("é = 'ü', f(3)  # your turn", "é = ...  # your turn"),
        (
            "def f(c):\n    d = c\n    return d['é'].get('x', '')  # your turn",
            "def f(c):\n    d = c\n    return ...  # your turn",
        ),
    ],
)
def test_an_exercise_is_its_solution_with_dots_where_the_learner_writes(solution, exercise):
    assert make_exercise(solution) == exercise


def notebook(exercise):
    solution = (
        "<details><summary>Solution</summary>\n\n```python\na = 1  # your turn\n```\n\n</details>"
    )
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("first"),
            nbformat.v4.new_code_cell(exercise, metadata={"tags": ["exercise"]}),
            nbformat.v4.new_code_cell("check"),
            nbformat.v4.new_markdown_cell(solution, metadata={"tags": ["solution"]}),
        ]
    )


def test_a_stale_exercise_is_found_and_made_anew_and_one_that_is_not_is_left_alone(tmp_path):
    page = tmp_path / "Page.ipynb"
    nbformat.write(notebook("a = 1"), page)
    before = page.read_bytes()
    with refuses("exercise-stale"):
        write_exercises(check=True, folder=tmp_path)
    assert page.read_bytes() == before
    assert write_exercises(check=False, folder=tmp_path) == 0
    assert [cell.source for cell in nbformat.read(page, 4).cells[:3]] == [
        "first",
        "a = ...  # your turn",
        "check",
    ]
    assert write_exercises(check=True, folder=tmp_path) == 0


def test_a_solved_page_has_the_solutions_in_its_exercises():
    assert [cell.source for cell in solve(notebook("a = ...")).cells[:3]] == [
        "first",
        "a = 1  # your turn",
        "check",
    ]

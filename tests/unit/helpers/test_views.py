"""What a page shows beside plain tables: folded fields, bars, tokens, a folder; and the small things around them.

Run: python -m helpers test tests/unit/helpers/test_views.py
"""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from bs4 import BeautifulSoup
from mlflow.models import ModelSignature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerFast

from helpers import (
    compare_figures,
    in_terminal,
    name_run,
    running,
    show_folder,
    show_signature,
    show_table,
    show_timeline,
    show_tokens,
)
from helpers.parameters import DEFAULTS
from helpers.show.tables import FoldedTable
from helpers.tracking import UI, TrackingStore, ui_addresses


def html_of(shown):
    return BeautifulSoup(shown._repr_html_(), "html.parser")


# --- tables -------------------------------------------------------------------------------------


def test_top_level_fields_stand_first_and_each_unfolds_what_is_inside_it():
    shown = show_signature(ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA))
    table = html_of(shown).table
    rows = table.tbody.find_all("tr", recursive=False)
    top = [row.th.get_text() for row in rows if row.th and not row.details]
    assert top == [*CHAT_MODEL_INPUT_SCHEMA.input_names(), *CHAT_MODEL_OUTPUT_SCHEMA.input_names()]
    folded = [row for row in rows if row.details]
    assert [row.summary.get_text() for row in folded] == [
        "11 fields inside messages",
        "15 fields inside tools",
        "14 fields inside choices",
        "3 fields inside usage",
    ]
    inside = [cell.get_text() for row in folded for cell in row.details.select("th[scope=row]")]
    assert len(top) + len(inside) == len(shown.rows)
    assert "messages[].tool_calls[].function.name" in inside
    assert all(row.find("td", colspan=True)["colspan"] == "5" for row in folded)
    # The text has every row, as it always had.
    assert repr(shown).count("\n") == len(shown.rows) + 3
    assert repr(shown).splitlines()[2].split() == ["Field", "Part", "Type", "Required", "Default"]


def test_a_name_that_only_begins_like_another_is_not_inside_it():
    rows = (
        ("stop", "x"),
        ("stop_words", "x"),
        ("stop_words.a", "x"),
        ("stop_words{}.b", "x"),
        ("stop", "y"),
    )
    found = html_of(FoldedTable("Fields", ("Field", "Part"), rows))
    assert [mark.get_text() for mark in found.find_all("summary")] == ["2 fields inside stop_words"]
    assert "1 field inside a" in FoldedTable("", ("f",), (("a",), ("a[].b",)))._repr_html_()


def test_markup_in_a_table_is_text_and_dollars_are_no_mathematics():
    table = html_of(
        show_table(
            "$1 & <b>", {"<script>": "costs $5\n  or $6", "link": "https://example.org/a?b=1&c=2"}
        )
    )
    assert table.caption.get_text() == "$1 & <b>"
    assert not table.find_all(["script", "b"])
    assert {"mathjax_ignore", "tex2jax_ignore"} <= set(table.table["class"])
    assert table.td.get_text() == "costs $5\n  or $6"
    assert table.a["href"] == table.a.get_text() == "https://example.org/a?b=1&c=2"
    assert not html_of(show_table("", {"no link": "see https://example.org"})).find_all("a")


def test_figures_stand_side_by_side_with_a_bar_each_and_a_text_twin():
    shown = compare_figures(
        {
            "A": {"load_seconds": 2.0, "tokens_per_second": 10.0},
            "B": {"load_seconds": 0.5, "tokens_per_second": 40.0, "disk_bytes": 0},
        }
    )
    assert shown.rows == (
        ("load (shorter is better)", "A", "2.00 s", "1.0000"),
        ("load (shorter is better)", "B", "0.50 s", "0.2500"),
        ("then (longer is better)", "A", "10.0 tokens per second", "0.2500"),
        ("then (longer is better)", "B", "40.0 tokens per second", "1.0000"),
        ("on disk (shorter is better)", "B", "0 MB", "0.0000"),
    )
    assert [bar["style"].split(";")[0] for bar in html_of(shown).select("td > div")] == [
        "width: 100.00%",
        "width: 25.00%",
        "width: 25.00%",
        "width: 100.00%",
        "width: 0.00%",
    ]
    lines = repr(shown).splitlines()
    assert lines[4].endswith("2.00 s                  " + "#" * 20)
    assert lines[5].endswith("0.50 s                  #####")
    assert compare_figures({}).rows == ()
    assert "figure" in repr(compare_figures({}))


def test_a_speed_that_nobody_could_tell_is_said_to_be_none_and_no_number_has_a_bar():
    shown = compare_figures(
        {
            "A": {"first_token_seconds": 0.01, "load_seconds": float("nan")},
            "B": {
                "first_token_seconds": 0.02,
                "tokens_per_second": 40.0,
                "disk_bytes": float("inf"),
            },
            "C": {},
        }
    )
    assert [row[1:3] for row in shown.rows] == [
        ("A", "0.01 s"),
        ("B", "0.02 s"),
        ("B", "40.0 tokens per second"),
        ("A", "the answer was too short to measure"),
    ]
    assert html_of(shown).select("td > div")[-1]["style"].startswith("width: 0.00%")


# --- callers over time ----------------------------------------------------------------------


def span(name, start, end):
    return SimpleNamespace(name=name, start_time_ns=start, end_time_ns=end)


def test_a_timeline_has_a_bar_for_each_stage_of_each_caller():
    shown = show_timeline(
        "<Two> callers",
        {
            "<b>": [
                span("caller", 0, 2000),
                span("read", 990, 1000),
                span("decode", 1250, 1500),
                span("wait", 1000, 1200),
                span("prefill", 1200, 1250),
            ],
            "later": [
                span("wait", 1500, 1500),
                span("prefill", 1500, 1750),
                span("decode", 1750, 2000),
            ],
        },
    )
    page = html_of(shown)
    assert [head.text for head in page.select("th")] == ["<b>", "later"]
    assert page.caption.text.startswith("<Two> callers: ")
    bars = [
        [
            (bar["title"], *re.findall(r"(?:left|width): ([\d.]+)%", bar["style"]))
            for bar in row.select("[title]")
        ]
        for row in page.select("tr")
    ]
    assert bars == [
        [("waiting", "0.00", "20.00"), ("reading", "20.00", "5.00"), ("writing", "25.00", "25.00")],
        [
            ("waiting", "50.00", "0.00"),
            ("reading", "50.00", "25.00"),
            ("writing", "75.00", "25.00"),
        ],
    ]
    first, second = repr(shown).splitlines()[1:]
    assert re.fullmatch(r"<b> {9}\.{12}r{3}w{15,16}", first)
    assert re.fullmatch(r"later {37,38}r{14,15}w{15,16}", second)


# --- tokens and folders -------------------------------------------------------------------------


def test_a_text_is_shown_token_by_token_with_markup_told_apart(tiny):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.transformers_dir)
    text = "<|user|>\nHi  é<b>$5 $6</b><|end|>"
    shown = show_tokens(tokenizer, text)
    assert [number for number, _, _ in shown.rows] == tokenizer.encode(
        text, add_special_tokens=False
    )
    pieces = [piece for _, piece, _ in shown.rows]
    assert (pieces[:2], pieces[-1]) == (["<|user|>", "⏎"], "<|end|>")
    assert "".join(pieces).count("␣") == 3
    assert "�" in "".join(pieces)  # the tiny vocabulary has no é: two halves of it
    assert [piece for _, piece, markup in shown.rows if markup] == ["<|user|>", "<|end|>"]
    boxes = html_of(shown).find_all("li")
    assert len(boxes) == len(pieces)
    assert boxes[0].get_text() == "<|user|>4 markup"
    assert ["dashed" in box["style"] for box in boxes] == [markup for _, _, markup in shown.rows]
    assert not html_of(shown).find_all("b")
    assert "mathjax_ignore" in html_of(shown).ol["class"]
    assert repr(shown).startswith(f"{len(pieces)} tokens\n")
    assert "4       <|user|>  markup" in repr(shown)


def test_every_file_of_a_folder_has_its_size_and_what_it_is_for(tmp_path):
    names = (
        "MLmodel",
        "artifacts/onnx/model.onnx.data",
        "artifacts/onnx/model.onnx",
        "artifacts/onnx/strange.bin",
        "model/model.safetensors.index.json",
        "model/model-00001-of-00002.safetensors",
        "model/config.json",
        "model/generation_config.json",
        "serving_input_example.json",
        "input_example.json",
        "prompt_model.py",
    )
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * number * 1000)
    rows = {name: (size, purpose) for name, size, purpose in show_folder(tmp_path).rows}
    assert set(rows) == set(names)
    assert next(iter(rows)) == "MLmodel"  # what lies deeper comes later
    assert rows["artifacts/onnx/model.onnx.data"] == ("1,000", "the weights of that graph")
    assert rows["artifacts/onnx/model.onnx"][1] == "the computation, as a graph"
    assert rows["artifacts/onnx/strange.bin"] == ("3,000", "")
    assert rows["model/generation_config.json"][1] != rows["model/config.json"][1]
    assert rows["serving_input_example.json"][1] != rows["input_example.json"][1]


# --- names and addresses ------------------------------------------------------------------------


def test_a_run_is_named_after_its_model_and_what_was_changed():
    assert name_run(**DEFAULTS | {"tracking_uri": "sqlite:///x.db"}) == "smollm2-135m"
    assert name_run(**DEFAULTS | {"model": "tiny-phi3", "max_tokens": 8, "temperature": 0.5}) == (
        "tiny-phi3: max_tokens=8, temperature=0.5"
    )
    assert name_run(**DEFAULTS | {"question": "x" * 99}) == "smollm2-135m: question=" + "x" * 40


def as_run(run_id, experiment_id):
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id, experiment_id=experiment_id))


def test_the_ui_addresses_lead_to_the_run_its_comparison_and_the_model():
    local = TrackingStore("sqlite:////x/mlflow.db", "file:///x/mlartifacts")
    one, other = as_run("abc", "1"), as_run("def", "2")
    assert ui_addresses(local, [one, one], "slm") == {
        "this run": f"{UI}/#/experiments/1/runs/abc",
        "the registered model": f"{UI}/#/models/slm",
    }
    both = ui_addresses(TrackingStore("http://there:8080", None), [one, other, one], "slm")
    assert both["side by side"] == (
        "http://there:8080/#/compare-runs?runs=%5B%22abc%22%2C%20%22def%22%5D"
        "&experiments=%5B%221%22%2C%20%222%22%5D"
    )
    assert both["this run"].startswith("http://there:8080/#/")


# --- servers and terminals ----------------------------------------------------------------------


def test_an_app_is_served_while_the_block_runs_and_not_after_it():
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))])
    with running(app) as address, running(app) as other:
        assert address != other
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(address).text == httpx.get(other).text == "here"
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_a_server_ends_also_when_the_block_fails():
    with pytest.raises(ZeroDivisionError), running(Starlette()) as address:
        1 / 0  # noqa: B018
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


@pytest.mark.skipif(sys.platform == "win32", reason="the lines are PowerShell's there")
def test_a_command_for_a_terminal_is_what_a_shell_reads_back(tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.environ['A'], os.path.dirname(sys.executable))"
    lines = in_terminal(["python", "-c", code, "it's", "a b", "$HOME"], A="x 'y' $z")
    said = subprocess.run(
        ["sh", "-c", lines], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    ).stdout
    assert said == f"[\"it's\", 'a b', '$HOME'] x 'y' $z {Path(sys.executable).parent}\n"


def test_a_command_for_powershell_doubles_its_quotes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    first, second, third, rest = in_terminal(["mlflow", "it's"], A="b c").split("\n")
    assert first.endswith("' + ';' + $env:PATH")
    assert (second, third, rest) == ("$env:A = 'b c'", "& 'mlflow' 'it''s'", "")

"""The command line: one table, and what it does with words that it does not know.

Run: python -m helpers test tests/unit/course/test_commands.py
"""

import errno
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from argparse import ArgumentParser

import pytest
from support import ALL_PAGES, PAGES, ROOT, refuses, run_python

from course.__main__ import _to_course_error, main
from course.commands import COMMANDS, run_command
from helpers.models.catalogue import read_catalogue
from helpers.tracking import tracking_store


@pytest.fixture
def done(monkeypatch):
    """Let commands set nothing up, execute nothing and prepare nothing; return the list of what they would do."""
    done = []
    monkeypatch.setattr("course.environment.inside_venv", lambda: False)
    monkeypatch.setattr("course.environment.differing_packages", lambda tests: {})
    monkeypatch.setattr(
        "course.execute.execute", lambda *arguments, on_answers: done.append(arguments)
    )
    monkeypatch.setattr("course.execute.print_page", lambda execution: None)
    monkeypatch.setattr(
        "helpers.models.prepare.prepare_model", lambda *arguments: done.append(arguments)
    )
    return done


def test_run_asks_the_question_that_it_was_given(done):
    assert (
        run_command(
            ["run", "--model", "tiny-phi3", "-p", "question", "-5?", "-p", "max_tokens", "7"]
        )
        == 0
    )
    parameters = {"model": "tiny-phi3", "question": "-5?", "max_tokens": 7}
    assert done == [
        ("tiny-phi3", "transformers"),
        (PAGES[0], parameters),
        ("tiny-phi3", "onnx"),
        (PAGES[1], parameters),
        ("tiny-phi3", "onnx"),
        (PAGES[2], parameters),
    ]


def test_run_takes_its_model_as_a_parameter_too(done, monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", "smollm2-135m")
    run_command(["run"])
    run_command(["run", "-p", "model", "tiny-phi3"])
    assert [arguments[0] for arguments in done if arguments[0] not in PAGES] == [
        "smollm2-135m"
    ] * 3 + ["tiny-phi3"] * 3
    assert done[-1][1] == {"model": "tiny-phi3"}


def test_a_notebook_gets_its_parameters_as_text_and_as_numbers(done, tmp_path):
    words = ["-p", "temperature", "0.5", "-p", "question", "1", "-p", "device", "cpu"]
    run_command(["notebook", "TransformerPipeline", *words, "--output", str(tmp_path)])
    assert done == [
        (
            "TransformerPipeline",
            {"temperature": 0.5, "question": "1", "device": "cpu"},
            tmp_path,
            False,
            None,
        )
    ]
    run_command(["notebook", "ChatModel", "--solved", "--output", str(tmp_path)])
    assert done[1:] == [("ChatModel", {}, tmp_path, True, None)]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run", "-p", "question"], "parameter-incomplete"),
        (["notebook", "X", "-p"], "parameter-incomplete"),
        (["run", "-p", "modle", "x"], "parameter-unknown"),
        (["run", "-p", "max_tokens", "many"], "parameter-type"),
        (["notebook", "X", "-p", "temperature", "__import__('os')"], "parameter-type"),
        (["walk"], "command-unknown"),
        (["prepare", "--export", "--track", "transformers"], "export-without-onnx"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_before_any_work(done, words, code):
    with refuses(code):
        run_command(words)
    assert not done


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "-p", "question", "Who?"],
        ["doctor", "-p", "question", "Who?"],
        ["bench", "now"],
        ["run", "fast"],
        ["kit"],
        ["kit", "serve"],
        ["ui", "--port", "70000"],
        ["ui", "--port", "x"],
        ["kit", "build", "x", "--mod", "y"],
    ],
)
def test_an_option_that_a_command_does_not_have_is_refused(done, words, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(words)
    assert end.value.code == 2
    assert "usage: python -m helpers" in capsys.readouterr().err
    assert not done


def test_the_words_after_a_tier_go_to_pytest(done, monkeypatch):
    monkeypatch.setattr(
        "course.tiers.run_tests", lambda name, words: done.append((name, words)) or 3
    )
    for name in ("check", "test", "nightly"):
        assert run_command([name, "-k", "no_such", "--collect-only", "tests/x.py"]) == 3
        assert done.pop() == (name, ["-k", "no_such", "--collect-only", "tests/x.py"])


@pytest.mark.parametrize(
    ("words", "page", "model"),
    [
        ([], "TransformerPipeline", "smollm2-135m"),
        (["--model", "tiny-phi3"], "TransformerPipeline", "tiny-phi3"),
        (["CustomPythonWrapper", "--model", "hub:org/name"], "CustomPythonWrapper", "hub:org/name"),
    ],
)
def test_lab_opens_a_page_with_the_model_that_it_was_given(done, monkeypatch, words, page, model):
    monkeypatch.delenv("COURSE_MODEL")
    monkeypatch.setattr(
        "course.commands._serve",
        lambda command, **variables: done.append((command, variables)) or 0,
    )
    assert run_command(["lab", *words]) == 0
    ((command, variables),) = done
    assert f"--LabApp.default_url=/lab/tree/notebooks/{page}.ipynb" in command
    assert variables.pop("PYTHONPATH").split(os.pathsep)[0] == str(ROOT)
    assert variables == {"COURSE_MODEL": model}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--model", "gpt-5"], "model-unknown"),
        (["Nothing"], "notebook-unknown"),
    ],
)
def test_lab_refuses_what_is_not_there_before_jupyterlab_starts(done, monkeypatch, words, code):
    monkeypatch.setattr("course.commands._serve", lambda command, **variables: done.append(command))
    with refuses(code):
        run_command(["lab", *words])
    assert not done


def test_every_command_has_help_and_stands_in_the_list(capsys):
    assert run_command([]) == run_command(["help"]) == run_command(["--help"]) == 0
    listed = re.findall(r"^  (\w+) +(.+)$", capsys.readouterr().out, re.MULTILINE)
    assert listed[: len(COMMANDS)] == [(name, command.help) for name, command in COMMANDS.items()]
    for name, command in COMMANDS.items():
        if command.has_help:  # its program tells its options: see below
            continue
        parser = ArgumentParser()
        for add_options in command.options:
            add_options(parser)
        with pytest.raises(SystemExit) as end:
            run_command([name, "--help"])
        assert end.value.code == 0
        assert command.help in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "program"), [("serve", "serving.service"), ("batch", "serving.batch")]
)
def test_a_program_of_serving_starts_on_the_courses_store_with_its_words(
    command, program, done, store, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "course.commands._serve",
        lambda command, **variables: done.append((command, variables)) or 0,
    )
    monkeypatch.setenv("COURSE_TRACKING_URI", store)
    assert run_command([command, "--model", "models:/x@y", "a", "b"]) == 0
    assert run_command([command, "--help"]) == 0
    (served, variables), (helped, _) = done
    assert served[1:] == ["-m", program, "--model", "models:/x@y", "a", "b"]
    assert variables == {"MLFLOW_TRACKING_URI": tracking_store(store).uri}
    assert helped[3:] == ["--help"]
    monkeypatch.setenv("COURSE_TRACKING_URI", "sqlite:///" + (tmp_path / "none.db").as_posix())
    with refuses("store-empty"):
        run_command([command])
    assert not (tmp_path / "none.db").exists()


# --- as a user sees it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["walk"], "Choose one of: run, notebook, prepare, check, test, nightly, "),
    ],
)
def test_the_command_line_ends_with_one_and_two_sentences(python, arguments, says):
    result = python("-m", "helpers", *arguments)
    assert result.returncode == 1
    assert re.fullmatch(r"error: \S.*\n       \S.*\n", result.stderr)
    assert says in result.stderr


def test_the_ui_says_when_there_is_nothing_to_show_and_when_its_port_is_taken(
    done, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("COURSE_TRACKING_URI", f"sqlite:///{(tmp_path / 'none.db').as_posix()}")
    with refuses("store-empty"):
        run_command(["ui"])
    monkeypatch.setenv("COURSE_TRACKING_URI", store)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with refuses("port-taken") as refusal:
            run_command(["ui", "--port", str(port)])
    assert refusal.value.what == f"Port {port} is taken."
    assert f"--port {port + 1}" in refusal.value.fix


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.ENOSPC, "disk-full", "The disk is full."),
        (errno.EROFS, "not-writable", "/course/build cannot be written."),
        (errno.EACCES, "not-writable", "/course/build cannot be written."),
    ],
)
def test_what_a_disk_refuses_becomes_two_sentences(number, code, says):
    error = _to_course_error(OSError(number, "no", "/course/build"))
    assert (error.code, error.what) == (code, says)
    assert _to_course_error(OSError(errno.ENOENT, "no", "/course/build")) is None


def test_a_store_that_is_none_is_refused_before_set_up(monkeypatch):
    monkeypatch.setattr(
        "course.commands._in_environment", lambda *arguments: pytest.fail("it went on")
    )
    for words in (["run"], ["notebook", "ChatModel"]):
        with refuses("store-path"):
            run_command([*words, "-p", "tracking_uri", "sqlite:////My%20Repo/build/mlflow.db"])
        monkeypatch.setenv("COURSE_TRACKING_URI", "postgresql://ann:sesame@there/mlflow")
        with refuses("store-kind"):
            run_command(words)


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no folder that somebody is in")
def test_a_terminal_whose_folder_is_gone_is_told_so(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        f"import os, runpy, sys; os.rmdir({str(gone)!r}); sys.path[0] = {str(ROOT)!r}; "
        "sys.argv[1:] = ['kit', 'check', 'x']; runpy.run_module('helpers', run_name='__main__', alter_sys=True)"
    )
    result = run_python(tmp_path, "-c", code, cwd=gone)
    assert (result.returncode, result.stderr) == (
        1,
        "error: This terminal is in a folder that no longer exists.\n"
        "       Change to another folder, and run this again.\n",
    )


def test_whoever_stops_reading_gets_no_stack(tmp_path):
    line = f"{shlex.quote(sys.executable)} -m helpers help | head -1"
    result = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("python -m helpers COMMAND, with one of:\n", "")


def test_the_ui_of_a_store_that_is_a_server_is_the_servers_own(done, monkeypatch, capsys):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "1")  # to be as it was at the end
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("COURSE_TRACKING_URI", "http://ann:sesame@127.0.0.1:9")
    with refuses("store-no-answer") as refusal:
        run_command(["ui"])
    assert "sesame" not in str(refusal.value)
    monkeypatch.setattr("helpers.tracking.ask_server", lambda uri, experiment: None)
    assert run_command(["ui"]) == 0
    assert capsys.readouterr().out.endswith("has a UI of its own: http://127.0.0.1:9\n")


def test_a_model_that_is_not_there_is_refused_with_those_that_are(monkeypatch, cache):
    monkeypatch.setattr("course.environment.inside_venv", lambda: False)
    monkeypatch.setattr("course.environment.differing_packages", lambda tests: {})
    with refuses("model-unknown") as refusal:
        run_command(["run", "--model", "gpt-5"])
    assert f"Choose one of: {', '.join(read_catalogue())}; or hub:" in refusal.value.fix


def test_a_page_that_is_not_there_is_refused_with_those_that_are():
    from course.execute import execute

    with refuses("notebook-unknown") as refusal:
        execute("Nothing", {})
    assert refusal.value.fix == f"Choose one of: {', '.join(sorted(ALL_PAGES))}."


def test_an_interruption_is_no_stack(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("course.commands.run_command", interrupt)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == (
        "\nInterrupted. What is finished stays: the same command goes on from there.\n"
    )

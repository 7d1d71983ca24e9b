"""The commands of ``python -m helpers``: a table with the help, the options and the function of each.

This module is imported on a bare Python, before set-up: it imports the standard library and modules
that do the same. The functions of the commands import the rest.
"""

import argparse
import ast
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from course import environment
from helpers.errors import CourseError
from helpers.models.catalogue import TRACKS, find_entry
from helpers.models.kit import PLATFORM_NAMES, PYTHONS
from helpers.parameters import DEFAULTS, PARAMETERS, check_variables, refuse_unknown
from helpers.paths import BUILD, DATA, ROOT
from helpers.stores.database import database_path

DEFAULT_MODEL = DEFAULTS["model"]
SMALL_MODELS = ("tiny-phi3", DEFAULT_MODEL)
# `mlflow ui` and JupyterLab listen on this address: only this machine reaches them.
LOOPBACK = "127.0.0.1"
NUMBERS = ("max_tokens", "temperature")
# The extras of pyproject.toml for each value of `Command.needs`.
EXTRAS = {
    "course": (),
    "tests": ("dev",),
    "nightly": ("dev", "nightly", "bench"),
    "bench": ("bench",),
}


@dataclass(frozen=True)
class Command:
    """One command of ``python -m helpers``."""

    help: str
    work: Callable[[Namespace], int]
    # Functions that add options to the command's parser.
    options: tuple[Callable[[ArgumentParser], None], ...] = ()
    needs: str = "course"  # what has to be installed: "nothing" or a key of EXTRAS
    parameters: tuple[str, ...] = ()  # the page parameters that -p NAME VALUE may set
    takes_words: bool = False  # unknown words are passed to the program that it starts
    has_help: bool = False  # --help is passed to that program, too


def run_command(arguments: list[str]) -> int:
    """Parse a command line, set up what the command needs, and run it. Return the exit code."""
    name = arguments[0] if arguments else "help"
    name = "help" if name in ("-h", "--help") else name
    if name not in COMMANDS:
        raise CourseError(
            "command-unknown",
            f"There is no command called {name}.",
            f"Choose one of: {', '.join(COMMANDS)}.",
        )
    command = COMMANDS[name]
    words = arguments[1:]
    parser = ArgumentParser(
        prog=f"python -m helpers {name}",
        description=command.help,
        allow_abbrev=False,
        add_help=not command.has_help,
    )
    for add_options in command.options:
        add_options(parser)
    parameters = {}
    if command.parameters:
        parser.epilog = "-p NAME VALUE sets a parameter of the notebook; as often as you like."
        words, parameters = _split_parameters(words, command.parameters)
    options, rest = parser.parse_known_args(words, Namespace(parameters=parameters))
    if rest and not command.takes_words:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if command.parameters:
        # Refuse a URI that is no store before set-up, which takes minutes.
        database_path(parameters.get("tracking_uri", ""))
    options.words = rest
    return _in_environment(command, options, arguments)


def _in_environment(command, options, arguments):
    """Run a command in an environment that has what it needs: this one, or else ``.venv``."""
    if command.needs == "nothing":
        return command.work(options)
    if environment.inside_venv():
        environment.set_up(EXTRAS[command.needs])
    elif environment.differing_packages(EXTRAS[command.needs]):
        line = [str(environment.set_up(EXTRAS[command.needs])), "-m", "helpers", *arguments]
        # uv does not compile packages. With this variable, each program would compile torch and MLflow
        # again.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        if os.name == "posix":
            os.execv(line[0], line)
        return subprocess.call(line)
    return command.work(options)


def _split_parameters(words, known):
    """Split ``-p NAME VALUE`` off a command line; argparse would refuse a value that starts with a dash.

    Returns the other words, and the parameters by name.
    """
    rest = []
    parameters = {}
    left = iter(words)
    for word in left:
        if word != "-p":
            rest.append(word)
            continue
        name = next(left, None)
        value = next(left, None)
        if value is None:
            raise CourseError(
                "parameter-incomplete",
                "-p has no name and value.",
                'Write both, such as: -p question "Who wrote Hamlet?".',
            )
        try:
            parameters[name] = ast.literal_eval(value) if name in NUMBERS else value
        except (ValueError, SyntaxError):
            raise CourseError(
                "parameter-type",
                f"{name} is {value!r}, and it has to be a number.",
                f"Write a number, such as: -p {name} 1.",
            ) from None
    refuse_unknown(parameters, known)
    return rest, parameters


# --- options ----------------------------------------------------------------------------------


def _model_option(parser):
    parser.add_argument(
        "--model",
        default=os.environ.get("COURSE_MODEL") or DEFAULT_MODEL,
        help="a name of data/models.toml, or hub:org/name",
    )


def _prepare_options(parser):
    parser.add_argument("--track", choices=TRACKS, help="what one track needs; left out: both")
    parser.add_argument(
        "--export", action="store_true", help="make the ONNX files of a hub: model here"
    )


def _notebook_options(parser):
    parser.add_argument("name", help="such as TransformerPipeline")
    parser.add_argument("--output", type=Path, default=BUILD / "course", help="folder for the page")
    parser.add_argument("--solved", action="store_true", help="with the exercises filled in")
    parser.add_argument(
        "--junit", type=_full_path, metavar="FILE", help="write a test case for each cell"
    )
    parser.add_argument(
        "--json", type=_full_path, metavar="FILE", help="write the run's figures and the answers"
    )


def _changed_options(parser):
    parser.add_argument(
        "--since", required=True, metavar="REF", help="a commit, branch or tag, such as origin/main"
    )
    parser.add_argument("--run", action="store_true", help="only pages that `run` executes")


def _lab_options(parser):
    parser.add_argument(
        "name", nargs="?", default="TransformerPipeline", help="the page that opens first"
    )


def _ui_options(parser):
    parser.add_argument("--port", type=_port, default=5000)


def _bench_options(parser):
    parser.add_argument(
        "--keep", action="store_true", help="measure nothing: put the last run into data/bench.json"
    )


def _exercises_options(parser):
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where an exercise is stale"
    )


def _kit_options(parser):
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build", allow_abbrev=False, help="gather wheels, models and the course in a folder"
    )
    build.add_argument("folder", type=Path, metavar="DIR")
    many = {"nargs": "+", "action": "extend", "default": []}
    build.add_argument(
        "--model", help=f"names of models; left out: {' and '.join(SMALL_MODELS)}", **many
    )
    build.add_argument(
        "--platform", choices=list(PLATFORM_NAMES.values()), help="left out: this machine's", **many
    )
    build.add_argument("--python", choices=PYTHONS, help="left out: the running one", **many)
    serve = actions.add_parser("serve", allow_abbrev=False, help="offer a kit to a room over HTTP")
    serve.add_argument("folder", type=Path, metavar="DIR")
    serve.add_argument("--host", default=LOOPBACK, help="0.0.0.0 for everybody in the network")
    serve.add_argument("--port", type=_port, default=8750, help="0 for any that is free")
    check = actions.add_parser("check", help="compare every file of a kit with what was built")
    check.add_argument("address", metavar="DIR_OR_URL")


def _generate_options(parser):
    parser.add_argument(
        "--tables", action="store_true", help="only the tables and charts, without a network"
    )


def _deploy_options(parser):
    parser.add_argument("cloud", choices=["azureml"], help="Azure Machine Learning")
    parser.add_argument(
        "--model", dest="address", default="models:/slm-onnx@champion", metavar="URI"
    )
    parser.add_argument(
        "--endpoint", metavar="NAME", help="of all that is made; left out: the model's and letters"
    )
    parser.add_argument("--instance-type", metavar="NAME", help="left out: a machine of 8 GiB")
    parser.add_argument(
        "--part", action="append", choices=["online", "batch", "job"], help="left out: all three"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="fill the files, print the commands, and send nothing",
    )


def _full_path(text):
    return Path(text).resolve()


def _port(text):
    port = int(text)
    if not 0 <= port < 65536:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return port


# --- functions of the commands ----------------------------------------------------------------


def _run(options):
    from course.execute import PAGES, execute, print_answers, print_page
    from helpers.models.prepare import prepare_model
    from helpers.tracking import tracking_store

    parameters = {"model": options.model} | options.parameters
    tracking_store(
        parameters.get("tracking_uri", "")
    )  # refuses a bad store before the model is downloaded
    for name, track in PAGES.items():
        # One track at a time: the first page need not wait for the other track's files.
        prepare_model(parameters["model"], track)
        print(f"\nRunning notebooks/{name}.ipynb", flush=True)
        print_page(execute(name, parameters, on_answers=print_answers))
    print(
        "\nOpen a page in a browser; `make lab` to step through it; `make ui` to see the runs in MLflow."
    )
    return 0


def _notebook(options):
    from course.execute import execute, print_answers, print_page
    from course.results import ResultFiles

    results = ResultFiles(options.junit, options.json) if options.junit or options.json else None
    print_page(
        execute(
            options.name,
            options.parameters,
            options.output.resolve(),
            options.solved,
            results,
            on_answers=print_answers,
        )
    )
    return 0


def _changed(options):
    from course.changed import changed_pages
    from course.pages import tracks_to_run

    for page in changed_pages(options.since):
        if not options.run or page in tracks_to_run():
            print(page)
    return 0


def _prepare(options):
    from helpers.models.prepare import prepare_model

    if options.export and options.track == "transformers":
        raise CourseError(
            "export-without-onnx",
            "--export makes ONNX files, and --track transformers needs none.",
            "Leave out one of them.",
        )
    prepared = prepare_model(options.model, options.track, options.export)
    print(f"{prepared.entry.title} is ready:")
    for folder in filter(None, (prepared.transformers_dir, prepared.onnx_dir)):
        print(f"  {folder}")
    return 0


def _tier(name, options):
    from course.tiers import run_tests

    return run_tests(name, options.words)


def _durations(options):
    from course.tiers import update_baseline

    return update_baseline()


def _lab(options):
    from course.execute import find_notebook
    from course.kernels import kernel_variables

    # Refuse an unknown name here rather than in the page's first cells.
    find_entry(options.model)
    page = quote(find_notebook(options.name).relative_to(ROOT).as_posix())
    return _serve(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            *lab_options(),
            f"--ServerApp.root_dir={ROOT}",
            f"--LabApp.default_url=/lab/tree/{page}",
        ],
        COURSE_MODEL=options.model,
        **kernel_variables(),
    )


def lab_options() -> list[str]:
    """Return JupyterLab's options for showing the course."""
    options = [
        f"--ServerApp.ip={LOOPBACK}",
        "--KernelManager.transport_encryption=auto",
        # Switches off news, the look-up of newer versions, and the question about them.
        f"--LabApp.app_settings_dir={DATA / 'jupyterlab'}",
        "--ServerApp.contents_manager_class=course.contents.Contents",
        "--ServerApp.kernel_spec_manager_class=course.kernels.Kernels",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")  # such as in a container; only this machine reaches it
    return options


def _ui(options):
    from course.doctor.checks import port_is_taken
    from helpers.tracking import tracking_store

    check_variables()
    if database_path() is None:
        print(
            f"The course's store is a tracking server, which has a UI of its own: {tracking_store().uri}"
        )
        return 0
    _refuse_empty_store("show")
    if port_is_taken(options.port):
        raise CourseError(
            "port-taken",
            f"Port {options.port} is taken.",
            f"Choose another one: python -m helpers ui --port {options.port + 1}.",
        )
    store = tracking_store().uri
    print(f"The MLflow UI: http://{LOOPBACK}:{options.port}   (Ctrl-C ends it)", flush=True)
    # MLflow imports a deprecated module of Starlette; a learner can do nothing about that.
    quiet = "ignore:starlette.middleware.wsgi is deprecated"
    return _serve(
        [
            sys.executable,
            "-m",
            "mlflow",
            "ui",
            "--backend-store-uri",
            store,
            "--registry-store-uri",
            store,
            "--host",
            LOOPBACK,
            "--port",
            str(options.port),
        ],
        PYTHONWARNINGS=quiet,
    )


def _refuse_empty_store(action):
    """Raise CourseError if no page has run yet: tracking_store would make an empty database."""
    database = database_path()
    if database and not database.exists():
        raise CourseError(
            "store-empty", f"There is nothing to {action} yet.", "Run the course first: make run."
        )


def _serve(command, **variables):
    """Replace this process by a server, so that the server itself handles Ctrl-C."""
    variables = dict(os.environ, **variables)
    if os.name == "posix":
        os.chdir(ROOT)
        os.execve(command[0], command, variables)
    return subprocess.call(command, cwd=ROOT, env=variables)


def _serving(program, action, options):
    """Replace this process by a program of serving/, which parses the words itself, on the course's store."""
    from helpers.tracking import tracking_store

    command = [sys.executable, "-m", program, *options.words]
    if {"-h", "--help"} & set(options.words):
        return _serve(command)
    check_variables()
    _refuse_empty_store(action)
    return _serve(command, MLFLOW_TRACKING_URI=tracking_store().uri)


def _deploy(options):
    from course.azure import PARTS, deploy

    check_variables()
    _refuse_empty_store("deploy")
    return deploy(
        options.address,
        options.endpoint,
        options.instance_type,
        options.part or PARTS,
        options.dry_run,
    )


def _bench(options):
    from benchmarks.notebooks import bench

    return bench(options.keep)


def _doctor(options):
    if not environment.inside_venv() and environment.is_set_up():
        return _in_environment(Command("", _doctor), options, ["doctor"])
    from course.doctor.checks import doctor  # it looks at what is there, and installs nothing

    return doctor()


def _generate(options):
    from course.generate import generate, generate_tables

    return generate_tables() if options.tables else generate()


def _exercises(options):
    from course.exercises import write_exercises

    return write_exercises(options.check)


def _kit(options):
    if options.action == "build":
        from course.kit.build import build

        return build(
            options.folder.resolve(),
            options.model or SMALL_MODELS,
            options.platform,
            options.python,
        )
    if options.action == "serve":
        from course.kit.serve import serve

        return serve(options.folder.resolve(), options.host, options.port)
    from course.kit.serve import check

    return check(
        options.address if "://" in options.address else str(Path(options.address).resolve())
    )


def _help(options):
    print("python -m helpers COMMAND, with one of:")
    for name, command in COMMANDS.items():
        print(f"  {name:<10} {command.help}")
    print(
        "`python -m helpers COMMAND --help` shows its options. The first that needs it sets up .venv."
    )
    return 0


COMMANDS = {
    "run": Command(
        "run the course's pages and say what came out",
        _run,
        (_model_option,),
        parameters=PARAMETERS,
    ),
    "notebook": Command(
        "run one page with parameters of your own",
        _notebook,
        (_notebook_options,),
        parameters=(*PARAMETERS, "track"),
    ),
    "prepare": Command("download and convert a model", _prepare, (_model_option, _prepare_options)),
    "check": Command(
        "run the fast tests; further words go to pytest",
        partial(_tier, "check"),
        needs="tests",
        takes_words=True,
    ),
    "test": Command(
        "run the tests to run before a change is sent; further words go to pytest",
        partial(_tier, "test"),
        needs="tests",
        takes_words=True,
    ),
    "nightly": Command(
        "run the long tests; further words go to pytest",
        partial(_tier, "nightly"),
        needs="nightly",
        takes_words=True,
    ),
    "durations": Command(
        "keep in git how long each file of the tests took in the last whole runs",
        _durations,
        needs="tests",
    ),
    "changed": Command(
        "print the pages that a change touches", _changed, (_changed_options,), needs="nothing"
    ),
    "lab": Command("open JupyterLab on the course", _lab, (_model_option, _lab_options)),
    "ui": Command("open the MLflow UI on the course's store", _ui, (_ui_options,)),
    "serve": Command(
        "serve a registered model to OpenAI's clients",
        partial(_serving, "serving.service", "serve"),
        takes_words=True,
        has_help=True,
    ),
    "batch": Command(
        "let a registered model answer a Parquet file on a Spark cluster",
        partial(_serving, "serving.batch", "ask"),
        takes_words=True,
        has_help=True,
    ),
    "deploy": Command(
        "fill the files for a cloud from a registered model, and send them there",
        _deploy,
        (_deploy_options,),
    ),
    "bench": Command(
        "measure, and write build/bench/bench.json", _bench, (_bench_options,), needs="bench"
    ),
    "doctor": Command("say what this machine can run", _doctor, needs="nothing"),
    "generate": Command(
        "write environment.yml, constraints.txt and the documents' tables",
        _generate,
        (_generate_options,),
        needs="tests",
    ),
    "exercises": Command(
        "make the pages' exercises from their solutions",
        _exercises,
        (_exercises_options,),
        needs="tests",
    ),
    "setup": Command("set up .venv and nothing else", lambda options: 0),
    "kit": Command(
        "build, serve or check an offline kit for a room without a network", _kit, (_kit_options,)
    ),
    "clean": Command(
        "remove build/", lambda options: environment.clean(everything=False), needs="nothing"
    ),
    "distclean": Command(
        "remove build/, data/models/ and .venv/",
        lambda options: environment.clean(everything=True),
        needs="nothing",
    ),
    "help": Command("show this list", _help, needs="nothing"),
}

"""The commands of ``python -m helpers``, once their packages are installed."""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

from helpers.errors import CourseError
from helpers.paths import BUILD, DATA, ROOT

DEFAULT_MODEL = "smollm2-135m"
SMALL_MODELS = ("tiny-phi3", DEFAULT_MODEL)
# What `mlflow ui` and JupyterLab listen on: this machine alone.
LOOPBACK = "127.0.0.1"


def main(arguments):
    """Run one command. Return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description="Run the course and look after it.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run both track notebooks and say what came out")
    _add_model(run)
    notebook = commands.add_parser("notebook", help="run one notebook with parameters of your own")
    notebook.add_argument("name", help="such as TransformerPipeline")
    notebook.add_argument("--output", type=Path, default=BUILD / "course", help="folder for the page")
    notebook.add_argument("-p", metavar="NAME VALUE", help="as often as you like")
    prepare = commands.add_parser("prepare", help="download and convert a model")
    _add_model(prepare)
    prepare.add_argument("--track", choices=("transformers", "onnx"), help="what one track needs; left out: both")
    prepare.add_argument("--export", action="store_true", help="make the ONNX files of a hub: model here")
    commands.add_parser("test", help="run every test; further words go to pytest")
    commands.add_parser("lab", help="open JupyterLab on the course")
    commands.add_parser("ui", help="open the MLflow UI on the course's store").add_argument(
        "--port", type=_port, default=5000)
    commands.add_parser("bench", help="measure, and write build/bench/bench.json")
    commands.add_parser("doctor", help="say what this machine can run")
    commands.add_parser("generate", help="write environment.yml, constraints.txt and the README's table anew")
    commands.add_parser("setup", help="set up .venv and nothing else")
    _add_kit(commands.add_parser("kit", help="build, serve or check an offline kit for a room without a network"))
    commands.add_parser("clean", help="remove build/")
    commands.add_parser("distclean", help="remove build/, data/models/ and .venv/")
    commands.add_parser("help", help="show this list")

    if arguments[:1] == ["test"]:
        return _test(arguments[1:])
    arguments, parameters = _split_parameters(arguments or ["help"])
    options = parser.parse_args(arguments, argparse.Namespace(parameters=parameters))
    if options.command == "help":
        parser.print_help()
        return 0
    if options.command == "setup":
        return 0  # what it does has been done on the way here
    return globals()["_" + options.command](options)


def _add_model(parser):
    parser.add_argument("--model", default=os.environ.get("COURSE_MODEL") or DEFAULT_MODEL,
                        help="a name of data/models.toml, or hub:org/name")


def _add_kit(parser):
    from helpers.kit import PLATFORM_NAMES, PYTHONS

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="gather wheels, models and the course in a folder")
    build.add_argument("folder", type=Path, metavar="DIR")
    many = {"nargs": "+", "action": "extend", "default": []}
    build.add_argument("--model", help=f"names of models; left out: {' and '.join(SMALL_MODELS)}", **many)
    build.add_argument("--platform", choices=list(PLATFORM_NAMES.values()), help="left out: this machine's", **many)
    build.add_argument("--python", choices=PYTHONS, help="left out: the running one", **many)
    serve = actions.add_parser("serve", help="offer a kit to a room over HTTP")
    serve.add_argument("folder", type=Path, metavar="DIR")
    serve.add_argument("--host", default=LOOPBACK, help="0.0.0.0 for everybody in the network")
    serve.add_argument("--port", type=_port, default=8750)
    check = actions.add_parser("check", help="compare every file of a kit with what was built")
    check.add_argument("address", metavar="DIR_OR_URL")


def _split_parameters(arguments):
    """Take each ``-p NAME VALUE`` out of a command line: argparse refuses a value that starts with a dash."""
    rest, parameters = [], {}
    words = iter(arguments)
    for word in words:
        if word == "-p":
            name, value = next(words, None), next(words, None)
            if value is None:
                raise CourseError("-p stands without a name and a value.", "Such as: -p question \"Who wrote Hamlet?\"")
            parameters[name] = value
        else:
            rest.append(word)
    return rest, parameters


def _port(text):
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535")
    return port


def _run(options):
    from helpers.execute import TRACKS, execute, print_answers
    from helpers.models import prepare_model

    prepare_model(options.model)
    for track in TRACKS:
        print(f"\nRunning notebooks/{track}.ipynb", flush=True)
        page = execute(track, {"model": options.model})
        print_answers(track, page)
    print("\nOpen a page in a browser; `make lab` to step through it; `make ui` to see the runs in MLflow.")
    return 0


def _notebook(options):
    from helpers.execute import execute, print_answers
    from helpers.parameters import refuse_unknown

    refuse_unknown(options.parameters)
    parameters = {}
    for name, value in options.parameters.items():
        try:
            parameters[name] = ast.literal_eval(value) if name in ("max_tokens", "temperature") else value
        except (ValueError, SyntaxError):
            raise CourseError(f"{name} is {value!r}, and it has to be a number.",
                              f"Such as: -p {name} 1") from None
    page = execute(options.name, parameters, options.output.resolve())
    print_answers(options.name, page, parameters.get("tracking_uri", ""))
    return 0


def _prepare(options):
    from helpers.models import prepare_model

    if options.export and options.track == "transformers":
        raise CourseError("--export makes ONNX files, and --track transformers wants none.", "Leave out one of them.")
    prepared = prepare_model(options.model, options.track, options.export)
    print(f"{prepared.card.title} is ready:")
    for folder in filter(None, (prepared.transformers_dir, prepared.onnx_dir)):
        print(f"  {folder}")
    return 0


def _test(words):
    # The model comes first: its progress bars belong in front of the tests, not inside one.
    from helpers.models import prepare_model

    for name in SMALL_MODELS:
        prepare_model(name)
    command = [sys.executable, "-m", "pytest", f"--basetemp={BUILD / 'pytest'}", *words]
    return subprocess.call(command, cwd=ROOT)


def _lab(options):
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.ip={LOOPBACK}", f"--ServerApp.root_dir={ROOT}",
               # No look-ups of news and newer versions, and no question about them.
               f"--LabApp.app_settings_dir={DATA / 'jupyterlab'}",
               "--LabApp.default_url=/lab/tree/notebooks/TransformerPipeline.ipynb",
               "--KernelManager.transport_encryption=auto"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # as in a container; it listens to this machine alone
    return _serve(command)


def _ui(options):
    from helpers.doctor import port_is_taken
    from helpers.tracking import SQLITE, tracking_store

    store = tracking_store().uri
    if store.startswith(SQLITE) and not Path(store.removeprefix(SQLITE)).exists():
        raise CourseError("There is nothing to show yet.", "Run the course first: make run")
    if port_is_taken(options.port):
        raise CourseError(f"Port {options.port} is taken.",
                          f"Choose another one: python -m helpers ui --port {options.port + 1}")
    print(f"The MLflow UI: http://{LOOPBACK}:{options.port}   (Ctrl-C ends it)", flush=True)
    # MLflow imports a module of Starlette's that is on its way out; the reader of the log can't help it.
    quiet = "ignore:starlette.middleware.wsgi is deprecated"
    return _serve([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--registry-store-uri", store,
                   "--host", LOOPBACK, "--port", str(options.port)], PYTHONWARNINGS=quiet)


def _serve(command, **variables):
    """Turn this process into a server; Ctrl-C is then the server's own business."""
    # Programs such as uvicorn are looked up on the PATH; the environment may not be activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = dict(os.environ, PATH=path, **variables)
    if os.name == "posix":
        os.chdir(ROOT)
        os.execve(command[0], command, environment)
    return subprocess.call(command, cwd=ROOT, env=environment)


def _bench(options):
    from helpers.bench import bench

    return bench()


def _doctor(options):
    from helpers.doctor import doctor

    return doctor()


def _kit(options):
    from helpers import kit

    if options.action == "build":
        from helpers import kit_build

        return kit_build.build(options.folder.resolve(), options.model or SMALL_MODELS, options.platform,
                               options.python)
    if options.action == "serve":
        from helpers import kit_serve

        return kit_serve.serve(options.folder.resolve(), options.host, options.port)
    return kit.check(options.address if "://" in options.address else str(Path(options.address).resolve()))


def _generate(options):
    from helpers.generate import generate

    return generate()


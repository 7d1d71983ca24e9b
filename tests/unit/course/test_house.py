"""The three packages helpers, course and serving: what each module may import.

Run: python -m helpers test tests/unit/course/test_house.py
"""

import ast
from graphlib import TopologicalSorter

import pytest
from support import ROOT

ROOMS = ("helpers", "course", "serving")
# What a room may import of the course, beside itself.
ALLOWED = {"helpers": set(), "serving": set(), "course": {"helpers", "serving"}}
# From the ground up: a module imports nothing that stands after it. A name ending in .* is a folder.
FLOORS = {
    "helpers": (
        "errors", "strangers", "paths", "files", "requirements",
        "models.steps", "models.pip", "models.catalogue", "models.space", "models.folders", "models.kit",
        "models.download", "models.usable", "models.hub", "models.convert", "models.sources",
        "models.prepare",
        "stores.database", "stores.server",
        "devices", "parameters", "tracking", "states", "tables", "signatures", "views", "measurement",
        "exercises", "servers", "operations.programs", "operations.evaluation", "operations.load",
        "operations.dashboard", "operations.drift", "operations.exercises", "cloud.simulation", "cloud.exercises",
        "playground",
    ),
    "course": (
        "uv_settings", "install", "environment", "contents", "kernels", "exercises", "static_page", "results",
        "execute", "changed", "tiers", "kit.wheels",
        "kit.check", "kit.build", "kit.serve", "doctor.network", "doctor.smoke",
        "doctor.checks", "bench.figures", "bench.turns", "bench.contenders", "bench.fidelity", "bench.clients",
        "bench.service", "cluster", "bench.spark",
        "bench.chat", "bench.notebooks", "generate", "mutate", "azure", "commands", "__main__",
    ),
    "serving": ("package", "chat.contract", "chat.table", "chat.folder", "chat.prompt", "chat.schema", "chat.sampler",
                "chat.text", "chat.decoder", "chat.engine", "chat.model", "chat.package", "errors", "events", "request",
                "served_model", "service.threads", "service.connection", "service.metrics", "service.admission",
                "service.active_version", "service.answer", "service.app", "service.http_server",
                "service.command_line", "service.__main__", "batch_model", "batch_cluster", "batch", "score"),
}
# The packages' own names, and the door that starts `course` as a program.
NO_FLOOR = {"helpers": {"", "cloud", "models", "operations", "stores", "__main__"},
            "course": {"", "kit", "doctor", "bench"}, "serving": {"", "chat", "service"}}


def files(room):
    return [path for path in sorted((ROOT / room).rglob("*.py")) if "__pycache__" not in path.parts]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for room in ROOMS for path in files(room)}


def imports(path):
    """Return the modules of the course that a file imports, at its top and inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # What is deployed travels, some of it under another name: it alone imports relatively.
            package = module_name(path.parent)
            assert node.level == 0 or package.startswith("serving"), f"{path} imports relatively"
            base = package.split(".")[:1 - node.level or None]
            module = ".".join([*base, node.module]) if node.level else node.module
            # `from helpers.models import kit` imports a module, `from helpers.paths import ROOT` a name.
            found |= {name if (name := f"{module}.{alias.name}") in MODULES else module for alias in node.names}
    return {name for name in found if name.split(".")[0] in ROOMS}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_imports_only_what_it_may(name):
    room = name.split(".")[0]
    foreign = {other for other in GRAPH[name] if other.split(".")[0] not in {room, *ALLOWED[room]}}
    assert foreign == set()
    # The chat model travels alone, and the other programs without it. What packs it stays here.
    others = GRAPH[name] - ({"serving.package"} if name == "serving.chat.package" else set())
    assert room != "serving" or {other.startswith("serving.chat") for other in others} <= {
        name.startswith("serving.chat")}


def test_what_is_imported_is_there():
    assert {other for found in GRAPH.values() for other in found} <= set(MODULES)


def test_there_is_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrow_points_upwards(room):
    floors = FLOORS[room]
    there = {name.removeprefix(room).lstrip(".") for name in MODULES if name.split(".")[0] == room}
    assert there == set(floors) | NO_FLOOR[room]
    for name in floors:
        within = {other.removeprefix(f"{room}.") for other in GRAPH[f"{room}.{name}"] if other.startswith(f"{room}.")}
        assert within <= set(floors[:floors.index(name)]), name

"""The calls on the pages fit the installed libraries' signatures, before anything runs.

Run: python -m helpers test tests/unit/notebooks/test_calls.py
"""

import ast
import importlib
import inspect
import types

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from support import ROOT

# What is followed. A call that starts anywhere else is the page's own business.
FOLLOWED = {
    "mlflow",
    "transformers",
    "onnxruntime_genai",
    "helpers",
    "serving",
    "papermill",
    "torch",
    "huggingface_hub",
}
PAGES = sorted((ROOT / "notebooks").glob("*.ipynb"))


class Instance:
    """What calling a class gives."""

    def __init__(self, kind: type):
        self.kind = kind


class Page:
    """The code of a page: what it imports, and the instances that it makes, by names that it gives to nothing else."""

    def __init__(self, code: str):
        self.tree = ast.parse(code)
        self.faults = []
        self.names = {}
        bound = [
            node.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        bound += [node.arg for node in ast.walk(self.tree) if isinstance(node, ast.arg)]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.names |= {
                    name: value for name, value in self.imported(node) if name not in bound
                }
        for node in ast.walk(self.tree):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call) if (
                    bound.count(name) == 1
                ):
                    self.names[name] = self.follow(call, quiet=True)

    def imported(self, node):
        for alias in node.names:
            module = node.module if isinstance(node, ast.ImportFrom) else alias.name
            if module.split(".")[0] not in FOLLOWED:
                continue
            try:
                value = importlib.import_module(module)
                if isinstance(node, ast.ImportFrom):
                    value = getattr(value, alias.name)
                elif alias.asname is None:
                    value = importlib.import_module(module.split(".")[0])
                yield alias.asname or alias.name.split(".")[0], value
            except (ImportError, AttributeError):
                try:
                    yield (
                        alias.asname or alias.name,
                        importlib.import_module(f"{module}.{alias.name}"),
                    )
                except ImportError as error:
                    self.faults.append(f"{ast.unparse(node)}: {error}")

    def follow(self, node, quiet=False):
        """Return what a name, an attribute or a call gives; None where only running it would tell."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name)
            case ast.Attribute(value=inner, attr=name):
                owner = self.follow(inner, quiet)
                if isinstance(owner, Instance):
                    # Of its fields a class tells nothing; its methods it has.
                    method = inspect.getattr_static(owner.kind, name, None)
                    return (
                        types.MethodType(method, owner)
                        if isinstance(method, types.FunctionType)
                        else None
                    )
                if owner is not None and not hasattr(owner, name) and not quiet:
                    self.faults.append(f"{ast.unparse(node)}: there is no {name}")
                return getattr(owner, name, None)
            case ast.Call(func=inner):
                function = self.follow(inner, quiet)
                if isinstance(inner, ast.Attribute) and function is None and not quiet:
                    self.check_method(inner)
                return Instance(function) if isinstance(function, type) else None
        return None

    def check_method(self, node):
        owner = self.follow(node.value, quiet=True)
        if isinstance(owner, Instance) and not any(
            hasattr(owner.kind, name) for name in (node.attr, "__getattr__")
        ):
            self.faults.append(f"{ast.unparse(node)}(): {owner.kind.__name__} has no such method")

    def check(self) -> list[str]:
        """Return what cannot work: an attribute that a library lacks, arguments that a function does not take."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self.follow(node)
            if not isinstance(node, ast.Call):
                continue
            self.follow(node)
            function = self.follow(node.func, quiet=True)
            complete = not any(isinstance(one, ast.Starred) for one in node.args) and all(
                keyword.arg for keyword in node.keywords
            )
            if function is None or isinstance(function, Instance) or not complete:
                continue
            try:
                signature = inspect.signature(function)
            except (ValueError, TypeError):  # compiled code, or a module
                continue
            try:
                signature.bind(
                    *node.args, **{keyword.arg: keyword.value for keyword in node.keywords}
                )
            except TypeError as error:
                self.faults.append(f"{ast.unparse(node.func)}(): {error}")
        return sorted(set(self.faults))


def read(sources: list[str]) -> list[str]:
    """Return the code of a page's cells, and that of each file of Python that a cell writes."""
    # Lines with % and ! become calls of IPython's own.
    transform = TransformerManager().transform_cell
    whole = [source for source in sources if not source.startswith("%%")]
    files = [source.partition("\n")[2] for source in sources if source.startswith("%%writefile")]
    return [transform("\n".join(whole)), *files]


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (
            "import mlflow\nmlflow.transformer.log_model()",
            "mlflow.transformer: there is no transformer",
        ),
        (
            "import mlflow\nmlflow.log_metric('a')",
            "mlflow.log_metric(): missing a required argument: 'value'",
        ),
        (
            "import mlflow\nwith mlflow.start_run(run_nam='a'): ...",
            "mlflow.start_run(): got an unexpected keyword",
        ),
        (
            "from mlflow import MlflowClient\nclient = MlflowClient()\nclient.set_alias('a')",
            "client.set_alias(): MlflowCl",
        ),
        (
            "from mlflow import MlflowClient\nMlflowClient().get_run()",
            "get_run(): missing a required argument: 'run_id'",
        ),
        ("from helpers import prepare", "from helpers import prepare: "),
    ],
)
def test_a_call_that_cannot_work_is_noticed(code, fault):
    (found,) = Page(code).check()
    assert fault in found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_call_on_a_page_fits_what_is_installed(path):
    cells = nbformat.read(path, as_version=4).cells
    for code in read([cell.source for cell in cells if cell.cell_type == "code"]):
        assert Page(code).check() == []

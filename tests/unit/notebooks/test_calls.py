"""The calls on the pages, bound against the installed libraries' signatures before anything runs.

Run: python -m helpers test tests/unit/notebooks/test_calls.py
"""
# ruff: noqa: N815  (ast wants its visitors named as its nodes are)

import ast
import importlib
import inspect
import re
import types

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from support import ROOT

# What is followed. A call that starts anywhere else is the page's own business.
FOLLOWED = {"mlflow", "transformers", "onnxruntime_genai", "helpers", "serving", "papermill", "torch",
            "huggingface_hub"}
# Cell magics whose cell runs as Python in the page's own namespace. The cells of all others are left out.
RUNS_HERE = {"time", "timeit", "capture", "prun"}
UNKNOWN = None  # what a name or a call gives that nobody can know without running it
BINDS_FIRST = ("generators", "iter", "value")  # is evaluated before its node's other fields, which may bind its names


class Scope:
    """The names of a page, a function, a class or a comprehension, and what is known about each."""

    def __init__(self, kind: str, outer: "Scope | None" = None):
        self.kind, self.outer = kind, outer
        self.names, self.ever, self.functions = {}, {}, []

    def nearest(self, *kinds: str) -> "Scope":
        """Return this scope or the first around it that is of such a kind."""
        return self if self.kind in kinds else self.outer.nearest(*kinds)

    def bind(self, name, value=UNKNOWN):
        self.names[name] = value
        self.ever.setdefault(name, []).append(value)

    def find(self, name):
        """Return what a name holds at this line."""
        if name in self.names:
            return self.names[name]
        if self.outer is None:
            return UNKNOWN
        return self.outer.settled(name) if self.kind == "function" else self.outer.find(name)

    def settled(self, name):
        """Return what a name holds whenever a function of this scope may be called, if that is one thing."""
        if name in self.ever:
            first, *others = self.ever[name]
            return first if all(other is first for other in others) else UNKNOWN
        return UNKNOWN if self.outer is None else self.outer.settled(name)


class Instance:
    """What calling a class gives, as far as the class tells."""

    def __init__(self, kind: type):
        self.kind = kind

    def method(self, name: str):
        """Return a method, bound; UNKNOWN for what only a live instance has; AttributeError for what none has."""
        try:
            static = inspect.getattr_static(self.kind, name)
        except AttributeError:
            fields = {field for base in self.kind.__mro__ for field in vars(base).get("__annotations__", ())}
            if name in fields or hasattr(self.kind, "__getattr__"):
                return UNKNOWN
            raise
        if isinstance(static, (staticmethod, classmethod)):
            return getattr(self.kind, name)
        if isinstance(static, types.FunctionType):
            return types.MethodType(static, self)
        return UNKNOWN


def named(thing) -> str:
    """Return what a reader calls a module, a class or another object."""
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    return getattr(thing, "__qualname__", type(thing).__qualname__)


def attribute(thing, name: str):
    """Return an attribute that the library has, or raise AttributeError with a sentence for the page's author."""
    try:
        return thing.method(name) if isinstance(thing, Instance) else getattr(thing, name)
    except (AttributeError, ImportError) as error:
        owner = thing.kind if isinstance(thing, Instance) else thing
        raise AttributeError(f"{named(owner)} has no {name}") from error


def refusal(function, call: ast.Call) -> str | None:
    """Return why a function refuses these arguments, or None when it takes them or doesn't say what it takes."""
    if not callable(function):
        return f"{named(function)} cannot be called"
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # compiled code
        return None
    positional, keywords, complete = [], {}, True
    for argument in call.args:
        if isinstance(argument, ast.Starred):
            known = isinstance(argument.value, (ast.List, ast.Tuple)) and not any(
                isinstance(element, ast.Starred) for element in argument.value.elts)
            if not known:
                complete = False
                break  # what follows has an unknown place
            positional += argument.value.elts
        else:
            positional.append(argument)
    for keyword in call.keywords:
        if keyword.arg is not None:
            keywords[keyword.arg] = keyword.value
        elif isinstance(keyword.value, ast.Dict) and all(
                isinstance(key, ast.Constant) for key in keyword.value.keys):
            keywords |= {key.value: UNKNOWN for key in keyword.value.keys}
        else:
            complete = False
    try:
        (signature.bind if complete else signature.bind_partial)(*positional, **keywords)
    except TypeError as error:
        return str(error)
    return None


class Reader(ast.NodeVisitor):
    """Read cells in their order, and note the calls that cannot work. Visiting an expression returns what it gives."""

    def __init__(self):
        self.scope, self.cell, self.faults, self.shared = Scope("page"), 0, [], set()

    def read(self, source: str, cell: int):
        """Read one cell. What stands in functions is read by `finish`, when all names of the page are known."""
        self.cell = cell
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            self.note(f"line {error.lineno}", f"is no Python: {error.msg}")
            return
        # A function writes to these whenever it is called: they are not followed anywhere.
        self.shared |= {name for node in ast.walk(tree) if isinstance(node, (ast.Global, ast.Nonlocal))
                        for name in node.names}
        self.visit(tree)

    def finish(self) -> list[tuple[int, str, str]]:
        for function in self.scope.functions:
            function()
        return self.faults

    def note(self, what: str, reason: str):
        self.faults.append((self.cell, what, reason))

    def within(self, scope: Scope, visit, *nodes):
        """Visit nodes in a scope of their own, and then the functions that were defined there."""
        outer, self.scope = self.scope, scope
        for node in nodes:
            visit(node)
        for function in scope.functions:
            function()
        self.scope = outer

    def generic_visit(self, node):
        # `except ... as name`, and the captures of `match`
        for name in (getattr(node, "name", None), getattr(node, "rest", None)):
            if isinstance(name, str):
                self.scope.bind(name)
        fields = dict(ast.iter_fields(node))
        for name in sorted(fields, key=lambda name: BINDS_FIRST.index(name) if name in BINDS_FIRST else 9):
            for child in fields[name] if isinstance(fields[name], list) else [fields[name]]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_Name(self, node):
        if not isinstance(node.ctx, ast.Load):
            return self.scope.bind(node.id)
        return UNKNOWN if node.id in self.shared else self.scope.find(node.id)

    def visit_NamedExpr(self, node):
        self.visit(node.value)
        self.scope.nearest("page", "function", "class").bind(node.target.id)

    def visit_Attribute(self, node):
        return self.follow(node, ast.unparse(node), called=False)

    def follow(self, node, whole: str, called: bool):
        """Return what a chain such as `mlflow.pyfunc.log_model` names, and note the first link that is not there."""
        if not isinstance(node, ast.Attribute):
            return self.visit(node)
        owner = self.follow(node.value, whole, called=False)
        if owner is UNKNOWN or not isinstance(node.ctx, ast.Load):
            return UNKNOWN
        try:
            return attribute(owner, node.attr)
        except AttributeError as error:
            # A class doesn't tell which fields its instances have; that a method is missing, it does.
            if called or not isinstance(owner, Instance):
                self.note(whole, str(error))
            return UNKNOWN

    def visit_Call(self, node):
        whole = f"{ast.unparse(node.func)}()"
        function = self.follow(node.func, whole, called=True)
        for child in (*node.args, *node.keywords):
            self.visit(child)
        return self.apply(function, node, whole)

    def apply(self, function, call: ast.Call, whole: str):
        if function is UNKNOWN or isinstance(function, Instance):
            return UNKNOWN
        if reason := refusal(function, call):
            self.note(whole, reason)
        return Instance(function) if isinstance(function, type) else UNKNOWN

    def visit_Import(self, node):
        for alias in node.names:
            root = alias.name.split(".")[0]
            module = self.module(alias.name, f"import {alias.name}") if root in FOLLOWED else UNKNOWN
            if alias.asname is None and module is not UNKNOWN:
                module = importlib.import_module(root)
            self.scope.bind(alias.asname or root, module)

    def visit_ImportFrom(self, node):
        followed = not node.level and node.module.split(".")[0] in FOLLOWED
        module = self.module(node.module, f"from {node.module}") if followed else UNKNOWN
        for alias in node.names:
            value = UNKNOWN
            if module is not UNKNOWN and alias.name != "*":
                try:
                    value = attribute(module, alias.name)
                except AttributeError as error:
                    try:
                        value = importlib.import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        self.note(f"from {node.module} import {alias.name}", str(error))
            self.scope.bind(alias.asname or alias.name, value)

    def module(self, name: str, whole: str):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            self.note(whole, str(error))
            return UNKNOWN

    def visit_FunctionDef(self, node):
        for decorator in node.decorator_list:
            value, whole = self.visit(decorator), f"@{ast.unparse(decorator)}"
            if not isinstance(decorator, ast.Call):  # it is called with what it decorates
                self.apply(value, ast.Call(decorator, [ast.Constant(node.name)], []), whole)
        if isinstance(node, ast.ClassDef):
            for child in (*node.bases, *node.keywords):
                self.visit(child)
            self.within(Scope("class", self.scope), self.visit, *node.body)
        else:
            self.visit_Lambda(node)
            if node.returns:
                self.visit(node.returns)
        self.scope.bind(node.name)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Lambda(self, node):
        arguments, cell = node.args, self.cell
        outer = self.scope.nearest("page", "function", "comprehension")  # a method doesn't see its class's names
        everyone = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        everyone = [argument for argument in everyone if argument]
        for child in (*arguments.defaults, *arguments.kw_defaults, *(argument.annotation for argument in everyone)):
            if child:
                self.visit(child)

        def body():
            scope = Scope("function", outer)
            for argument in everyone:
                scope.bind(argument.arg)
            self.cell = cell
            self.within(scope, self.visit, *(node.body if isinstance(node.body, list) else [node.body]))

        self.scope.nearest("page", "function").functions.append(body)

    def visit_ListComp(self, node):
        self.within(Scope("comprehension", self.scope), self.generic_visit, node)

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp


def faults(sources: list[str]) -> list[str]:
    """Return what cannot work in a page's code cells, one line for each: the cell, the call and the reason."""
    page, found = Reader(), []
    transform = TransformerManager().transform_cell  # lines with % and ! become calls of IPython's own
    for number, source in enumerate(sources, start=1):
        magic = re.match(r"%%(\w+)[ \t]*(.*)\n?", source)
        rest = source[magic.end():] if magic else source
        if magic is None or magic[1] in RUNS_HERE:
            page.read(transform(rest), number)
        elif magic[1] == "writefile" and not re.search(r"(?:\.(?!py\b)\w+|\bDockerfile|\bMakefile)[\"']?$", magic[2]):
            file = Reader()
            file.read(rest, number)
            found += file.finish()
    found = sorted(found + page.finish(), key=lambda fault: fault[0])
    return [f"code cell {cell}: {what}: {reason}" for cell, what, reason in found]


GOOD = [
    ("import mlflow\nmlflow.log_metrics({'a': 1})",),
    ("import mlflow.pyfunc as flavor\nflavor.load_model('models:/a@b')",),
    ("import mlflow", "mlflow.set_experiment('a')"),
    ("from mlflow import MlflowClient\nMlflowClient().set_registered_model_alias('a', 'champion', 1)",),
    ("from mlflow import models\nmodels.set_model(None)",),
    ("from helpers.paths import BUILD\nBUILD.mkdir(exist_ok=True)",),
    ("from serving import chat_model\nprint(chat_model.Batch.step, chat_model.ChatRequest(messages=[]).messages)",),
    ("import onnxruntime_genai as og\nog.GeneratorParams(og.Model('a')).set_search_options(max_length=1)",),
    ("import mlflow\n%matplotlib inline\n!ls\nmlflow.end_run()",),
    ("%%bash\nmlflow.nothing()",),
    ("%%writefile Dockerfile\nFROM python:3.11",),
    ("%%writefile 'a.py'\nimport mlflow", "mlflow.nothing()"),  # the page itself has imported nothing
    # What the arguments are, nobody knows before the page runs.
    ("import mlflow\nmlflow.log_metric(*pair)\nmlflow.log_metric(**pair)",),
    ("import mlflow\nmlflow.log_metric('a', **{'value': 1})\nmlflow.log_metric(*['a', 1])",),
    # A name that the page has given to something else, or may have.
    ("import mlflow\nmlflow = object()\nmlflow.nothing()",),
    ("import mlflow\nfor mlflow in pages:\n    mlflow.nothing()",),
    ("import mlflow\nwith room() as mlflow:\n    mlflow.nothing()",),
    ("import mlflow\ndef mlflow(): ...\nmlflow.nothing()",),
    ("import mlflow\nclass mlflow: ...\nmlflow.nothing()",),
    ("import mlflow\ndef ask(mlflow):\n    return mlflow.nothing()",),
    ("import mlflow\nask = lambda mlflow: mlflow.nothing()",),
    ("import mlflow\nmade = [mlflow.nothing() for mlflow in pages]",),
    ("import mlflow\nif (mlflow := other):\n    mlflow.nothing()",),
    ("import mlflow\nany(mlflow := page for page in pages)\nmlflow.nothing()",),
    ("import mlflow\ntry: ...\nexcept OSError as mlflow:\n    mlflow.nothing()",),
    ("import mlflow\nmatch page:\n    case [mlflow]:\n        mlflow.nothing()",),
    ("import mlflow\ndef ask():\n    return mlflow.nothing()", "mlflow = other\nask()"),
    ("import mlflow\ndef change():\n    global mlflow\n    mlflow = other", "change()\nmlflow.nothing()"),
    ("mlflow = other\ndef ask():\n    return mlflow.nothing()", "ask()\nimport mlflow"),
    # What no class tells about its instances.
    ("from mlflow import MlflowClient\nprint(MlflowClient().nothing)",),
    ("import torch\ntorch.nn.Linear(1, 1).nothing()",),
    ("import mlflow\nmlflow.start_run(run_name='a').info.nothing()",),
    ("import torch\ntorch.nn.Linear(1, 1).weight.nothing()",),
]
BAD = [
    (("import mlflow\nmlflow.transformer.log_model()",), "mlflow.transformer.log_model(): mlflow has no transformer"),
    (("import mlflow\nmlflow.pyfunc.log_modl()",), "mlflow.pyfunc.log_modl(): mlflow.pyfunc has no log_modl"),
    (("import mlflow\nmlflow.pyfunc.log_model(nam='a')",), "unexpected keyword argument 'nam'"),
    (("import mlflow\nmlflow.log_metric('a')",), "mlflow.log_metric(): missing a required argument: 'value'"),
    (("import mlflow\nmlflow.end_run('a', 1)",), "mlflow.end_run(): too many positional arguments"),
    (("import mlflow\nmlflow.log_metric(*pair, valu=1)",), "unexpected keyword argument 'valu'"),
    (("import mlflow\nmlflow.log_metric('a', **{'valu': 1})",), "mlflow.log_metric()"),
    (("import mlflow\nmlflow.pyfunc()",), "mlflow.pyfunc(): mlflow.pyfunc cannot be called"),
    (("import mlflow.pyfun",), "import mlflow.pyfun: No module named 'mlflow.pyfun'"),
    (("from mlflow.pyfun import load_model",), "from mlflow.pyfun: No module named 'mlflow.pyfun'"),
    (("from helpers import prepare",), "from helpers import prepare: helpers has no prepare"),
    (("from helpers import show_table as show\nshow('a')",), "show(): missing a required argument"),
    (("from mlflow import MlflowClient\nMlflowClient().set_alias('a')",), "MlflowClient has no set_alias"),
    (("from mlflow import MlflowClient\nMlflowClient().set_registered_model_alias('a', 'b')",),
     "set_registered_model_alias(): missing a required argument: 'version'"),
    (("from mlflow import MlflowClient\nMlflowClient(uri='a').get_run('b')",), "unexpected keyword argument 'uri'"),
    (("import onnxruntime_genai as og\nog.Modl('a')",), "og.Modl(): onnxruntime_genai has no Modl"),
    (("import onnxruntime_genai as og\nog.Generator(a, b).append()",), "Generator has no append"),
    (("from serving import chat_model\nprint(chat_model.SETTING)",), "serving.chat_model has no SETTING"),
    (("import papermill\npapermill.execute_notebook('a.ipynb')",), "'output_path'"),
    (("from huggingface_hub import ModelCard\nModelCard.load()",), "ModelCard.load(): missing a required argument"),
    (("import torch\ntorch.accelerator.is_there()",), "torch.accelerator has no is_there"),
    (("%%writefile \"{file}\"\nimport mlflow\nmlflow.models.set_modl(1)",), "mlflow.models has no set_modl"),
    (("%%time\nimport mlflow\nmlflow.nothing()",), "code cell 1: mlflow.nothing()"),
    (("x = 1", "import mlflow", "mlflow.nothing()"), "code cell 3: mlflow.nothing()"),
    (("def ask():\n    def inner():\n        return mlflow.nothing()", "import mlflow"), "cell 1: mlflow.nothing()"),
    (("import mlflow\nasync def ask(run=mlflow.nothing()): ...",), "mlflow.nothing()"),
    (("import mlflow\nclass Model(mlflow.pyfunc.PythonModl): ...",), "mlflow.pyfunc has no PythonModl"),
    (("import mlflow\nclass Model:\n    mlflow = 1\n    def ask(self): mlflow.nothing()",), "mlflow.nothing()"),
    (("def ask():\n    import mlflow\n    mlflow.nothing()",), "mlflow.nothing()"),
    (("import mlflow\nprint(f'{1:>{mlflow.nothing()}} {mlflow.active_run()}')",), "mlflow.nothing()"),
    (("import mlflow\n@mlflow.trac\ndef ask(): ...",), "mlflow.trac: mlflow has no trac"),
    (("import mlflow\n@mlflow.trace(title='a')\ndef ask(): ...",), "unexpected keyword argument 'title'"),
    (("import mlflow\n@mlflow.active_run\ndef ask(): ...",), "@mlflow.active_run: too many positional arguments"),
    (("import mlflow\nwith mlflow.start_run(run_nam='a') as run: ...",), "unexpected keyword argument 'run_nam'"),
    (("import mlflow\nmade = [mlflow.nothing() for _ in pages]",), "mlflow.nothing()"),
    (("import mlflow\nmade = [mlflow for mlflow in pages]\nmlflow.nothing()",), "mlflow.nothing()"),
    (("class Model:\n    def ask(self): mlflow.nothing()", "import mlflow"), "mlflow.nothing()"),
    (("import mlflow.pyfunc\nmlflow.nothing()",), "mlflow.nothing(): mlflow has no nothing"),
    (("from huggingface_hub import ModelCard\nModelCard('a').load()",), "load(): missing a required argument"),
    (("import mlflow\nmlflow = mlflow.nothing()",), "mlflow.nothing()"),
    (("import mlflow\nmlflow.log_metrics({'a': mlflow.nothing()})",), "mlflow.nothing()"),
    (("mlflow = 1\nimport mlflow\nmlflow.nothing()",), "mlflow.nothing()"),
    (("import mlflow\nmlflow.log_metric(",), "line 2: is no Python"),
]
PAGES = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("sources", GOOD, ids=" | ".join)
def test_a_call_that_works_or_cannot_be_known_is_no_fault(sources):
    assert faults(list(sources)) == []


@pytest.mark.parametrize(("sources", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_call_that_cannot_work_is_one_fault(sources, reason):
    (fault,) = faults(list(sources))
    assert reason in fault
    assert fault.startswith("code cell ")


def test_the_faults_of_a_page_come_in_the_order_of_its_cells():
    found = faults(["import mlflow\ndef ask(): return mlflow.a()", "mlflow.b()", "%%writefile x.py\nimport mlflow.c"])
    assert [fault.split(":")[0] for fault in found] == ["code cell 1", "code cell 2", "code cell 3"]


@pytest.mark.slow  # what the pages name makes transformers import half of itself, which takes seconds
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_call_on_a_page_fits_what_is_installed(path):
    cells = nbformat.read(path, as_version=4).cells
    assert faults([cell.source for cell in cells if cell.cell_type == "code"]) == []

"""Shows an MLflow model's signature as a table with a row for each field, also for nested fields."""

from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, get_model_info
from mlflow.models.model import ModelInfo
from mlflow.pyfunc import PyFuncModel
from mlflow.types.schema import Array, Map, Object, TensorSpec

from helpers.errors import CourseError
from helpers.show.tables import FoldedTable, Table

COLUMNS = ("Field", "Part", "Type", "Required", "Default")


def show_signature(model: ModelSignature | ModelInfo | PyFuncModel | str) -> Table:
    """Return a table of a signature's inputs, outputs and parameters.

    ``model`` is a signature, an object that has one, or the URI of a logged or registered model. In
    the table, ``messages[].role`` is the field ``role`` of each element of ``messages``, and
    ``properties{}`` is every value of a map.

    Raises
    ------
    CourseError
        There is no such model, or it has no signature.
    """
    signature = find_signature(model)
    rows = []
    for part, schema in (("input", signature.inputs), ("output", signature.outputs)):
        for index, column in enumerate(schema or []):
            if isinstance(column, TensorSpec):
                # MLflow requires every tensor.
                rows.append(
                    (
                        column.name or str(index),
                        part,
                        f"tensor of {column.type}, shape {column.shape}",
                        "required",
                        "",
                    )
                )
            else:
                rows += _fields(
                    part,
                    str(column.name or ("" if len(schema.inputs) == 1 else index)),
                    column.type,
                    column.required,
                )
    for param in signature.params or []:
        rows += _fields(
            "parameter",
            param.name,
            param.dtype,
            False,
            shape=param.shape,
            default=repr(param.default),
        )
    return FoldedTable("Signature", COLUMNS, tuple(rows))


def compare_signatures(a, b, names: tuple[str, str] = ("first", "second")) -> Table:
    """Return a table of two signatures side by side, each given as for ``show_signature``.

    ``names`` are the headings of their columns. The table has a row for each field that either has,
    first those of ``a``. A dash means that a signature does not have the field.

    Raises
    ------
    CourseError
        One of them has no signature.
    """
    one, other = (
        {
            (part, field): " ".join(
                filter(None, (f"{kind}, {required}", default and f"({default})"))
            )
            for field, part, kind, required, default in show_signature(model).rows
        }
        for model in (a, b)
    )
    rows = [
        (field, part, one.get((part, field), "-"), other.get((part, field), "-"))
        for part, field in dict.fromkeys([*one, *other])
    ]
    # The sort is stable: fields keep their order.
    rows.sort(key=lambda row: ("input", "output", "parameter").index(row[1]))
    return FoldedTable("Two signatures", ("Field", "Part", *names), tuple(rows))


def find_signature(model) -> ModelSignature:
    """Return the ModelSignature of an argument of ``show_signature``."""
    if isinstance(model, str):
        try:
            model = get_model_info(model)
        except (MlflowException, OSError) as error:
            raise CourseError(
                "model-absent",
                f"There is no model at {model!r}.",
                "Check the name, the alias and the tracking URI.",
            ) from error
    signature = model if isinstance(model, ModelSignature) else getattr(model, "signature", None)
    if signature is None and isinstance(model, PyFuncModel):
        signature = model.metadata.signature
    if not isinstance(signature, ModelSignature):
        raise CourseError(
            "signature-absent",
            f"This {type(model).__name__} has no signature.",
            "Log the model with signature= or input_example=, and show that one.",
        )
    return signature


def _fields(part, name, dtype, required, shape=None, default=""):
    """Return the row of a field, followed by the rows of the fields inside it."""
    brackets = "[]" if shape else ""
    kind = "list of " if shape else ""
    while isinstance(dtype, Array | Map):
        kind += "list of " if isinstance(dtype, Array) else "map of string to "
        brackets += "[]" if isinstance(dtype, Array) else "{}"
        dtype = dtype.dtype if isinstance(dtype, Array) else dtype.value_type
    inner = []
    if isinstance(dtype, Object):
        kind += "object"
        for field in dtype.properties:
            path = f"{name}{brackets}.{field.name}".lstrip(".")
            inner += _fields(part, path, field.dtype, field.required)
    else:
        # DataType has a name; AnyType has none and is what its repr says.
        kind += getattr(dtype, "name", None) or "any"
    return [
        (name or "(unnamed)", part, kind, "required" if required else "optional", default),
        *inner,
    ]

"""What a page imports: model set-up, parameter checks, signature tables, measurements.

The names are loaded on first use, so that ``python -m helpers`` starts on a bare Python that has
none of the course's packages yet. Importing this changes nothing in the process.
"""

_HOME = {
    "CourseError": "helpers.errors",
    "CatalogueEntry": "helpers.models.catalogue",
    "read_catalogue": "helpers.models.catalogue",
    "PreparedModel": "helpers.models.prepare",
    "prepare_model": "helpers.models.prepare",
    "check_parameters": "helpers.parameters",
    "check_fits": "helpers.parameters",
    "name_run": "helpers.parameters",
    "check": "helpers.exercises",
    "show_playground": "helpers.show.playground",
    "torch_device": "helpers.devices",
    "onnx_provider": "helpers.devices",
    "show_signature": "helpers.show.signatures",
    "compare_signatures": "helpers.show.signatures",
    "measure": "helpers.measurement",
    "show_table": "helpers.show.tables",
    "show_tokens": "helpers.show.views",
    "show_folder": "helpers.show.views",
    "compare_figures": "helpers.show.views",
    "show_timeline": "helpers.show.views",
    "tracking_store": "helpers.tracking",
    "ui_addresses": "helpers.tracking",
    "check_run": "helpers.states",
    "check_model": "helpers.states",
    "check_name": "helpers.states",
    "running": "helpers.servers",
    "in_terminal": "helpers.servers",
    "pinned": "helpers.requirements",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError("module 'helpers' has no attribute " + repr(name))
    import importlib

    from helpers.shadowing import refuse_shadowing_files

    refuse_shadowing_files()
    return getattr(importlib.import_module(_HOME[name]), name)

"""Runs ``python -m helpers COMMAND``: the package ``course`` has the commands."""

import runpy

runpy.run_module("course", run_name="__main__", alter_sys=True)

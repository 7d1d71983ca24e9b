"""``python -m helpers COMMAND`` is the course's one command: it runs the package ``course``, which stands beside."""

import runpy

runpy.run_module("course", run_name="__main__", alter_sys=True)

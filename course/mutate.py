"""Plants one fault after the other in the policies, with mutmut, and counts those that the fast tests notice.

Words choose faults by mutmut's names; left out, all of POLICIES. ``pyproject.toml`` says which files these are in, and
``tests/mutants.md`` why those that the tests let live may.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys

from helpers.paths import BUILD, ROOT, model_cache

# mutmut's names of what decides something. Of the chat model: the contract, the prompt, the engine, the sampler and the
# text; of downloads: when a request is made again, and which files are there.
POLICIES = (
    "helpers.models.folders.*", "helpers.models.hub.*", "helpers.models.usable.*", "helpers.parameters.*",
    "helpers.signatures.*", "helpers.stores.*", "helpers.tracking.*", *(f"helpers.models.download.{name}*" for name in (
        "x_seconds", "x_retried", "x_patience", "x__watched", "x_certificate", "xǁ")),
    *(f"serving.chat.{name}.*" for name in ("contract", "table", "prompt", "engine", "sampler", "text")))
REACH = 0.85
SITE = BUILD / "mutate"
COPIED = ("course", "data", "helpers", "notebooks", "serving", "tests", "LICENSE", "constraints.txt", "pyproject.toml")


def mutate(words: list[str]) -> int:
    """Run mutmut on a copy of the course, print the score and what lives. Return 1 where it is below REACH."""
    for name in COPIED:
        if (ROOT / name).is_file():
            SITE.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, SITE / name)
        else:
            shutil.rmtree(SITE / name, ignore_errors=True)
            shutil.copytree(ROOT / name, SITE / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors",
                                                                                    "*.onnx*", "*.gguf"))
    patterns = words or POLICIES
    _mutmut("run", *patterns, capture_output=False)
    found = re.findall(r"^ +(\S+__mutmut_\d+): (.+)$", _mutmut("results", "--all", "true").stdout, re.MULTILINE)
    chosen = {name: state for name, state in found if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    survivors = [name for name, state in chosen.items() if state not in ("killed", "timeout", "segfault")]
    for name in survivors:
        old, new = (" ".join(re.findall(rf"^\{sign} +(.*)$", _mutmut("show", name).stdout, re.MULTILINE))
                    for sign in "-+")
        print(f"- `{name.split('__mutmut_')[0]}`: `{old}` became `{new}`")
    score = 1 - len(survivors) / len(chosen)
    print(f"{len(chosen)} faults, {len(chosen) - len(survivors)} noticed: {score:.1%}, and {REACH:.0%} should be.")
    return int(score < REACH)


def _mutmut(*words, capture_output=True):
    return subprocess.run([sys.executable, "-m", "mutmut", *words], cwd=SITE, check=True, text=True, encoding="utf-8",
                          capture_output=capture_output, env=dict(os.environ, COURSE_CACHE=str(model_cache())))

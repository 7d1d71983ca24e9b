"""Generates five tokens on tiny-phi3 with each track, each in a process of its own.

A processor without an instruction or a broken library ends a process: that one, and not the
doctor's.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

from course.doctor.result import Result, fail, ok
from helpers.models.steps import last_line
from helpers.paths import ROOT, model_cache

TRACK_TIMEOUT = 120  # seconds


def check_tracks() -> Iterator[Result]:
    """Check that both tracks generate five tokens on tiny-phi3, which is prepared if it is not there."""
    code, output = run_module("helpers", "prepare", "--model", "tiny-phi3")
    if code:
        told = re.search(r"^error: (.*)\n +(.*)$", output, re.MULTILINE)
        if told:
            yield fail(*told.groups())
        else:
            yield fail(
                f"tiny-phi3 could not be prepared: {last_line(output)}",
                "If another process prepares it, wait for that one, and run: "
                "python -m helpers prepare --model tiny-phi3",
            )
        return
    for name, track in (("A", "transformers"), ("B", "onnx")):
        begun = time.perf_counter()
        code, output = run_module("course.doctor.smoke", track)
        seconds = time.perf_counter() - begun
        if code == 0 and "tokens: 5\n" in output:
            yield ok(
                f"track {name} generated 5 tokens on tiny-phi3 in {seconds:.0f} s, loading included"
            )
        else:
            yield track_failure(name, code, output)


def run_module(
    *words: str, env: Mapping[str, str] = os.environ, timeout: float = TRACK_TIMEOUT
) -> tuple[int, str]:
    """Run ``python -m WORDS`` for ``timeout`` seconds at most; return its exit code and all that it printed."""
    try:
        program = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=dict(env, PYTHONUTF8="1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer in {timeout} s"
    return program.returncode, program.stdout


def track_failure(track: str, code: int, output: str) -> Result:
    """Return the result for a track whose process ended with ``code``: a signal if it is negative."""
    ended = f"exit code {code:#x}" if code > 255 else f"exit code {code}"  # Windows has large ones
    if code < 0:
        ended = signal.Signals(-code).name
    if ended in ("SIGILL", "exit code 0xc000001d"):
        fix = "This processor lacks an instruction that the track's library needs: use another machine."
    elif ended == "SIGKILL":
        fix = "The system ended it, most often for lack of memory: close programs, or give the container more."
    elif "DLL load failed" in output:
        fix = (
            "Install Microsoft's Visual C++ Redistributable, https://aka.ms/vs/17/release/vc_redist.x64.exe; "
            "if it is there, delete .venv and run: python -m helpers setup"
        )
    else:
        fix = (
            f"Delete {model_cache() / 'tiny-phi3'} and run this again; "
            "if it stays, delete .venv and run: python -m helpers setup"
        )
    return fail(
        f"track {track} did not generate on tiny-phi3: {ended}; the last line was: {last_line(output)}",
        fix,
    )


def _generate(track):
    """Generate five tokens on tiny-phi3, in this process, and print how many there are."""
    from helpers.models.prepare import prepare_model

    prepared = prepare_model("tiny-phi3")
    prompt = "The capital of Spain is"
    if track == "transformers":
        import transformers

        pipeline = transformers.pipeline(
            prepared.entry.task, model=str(prepared.transformers_dir), trust_remote_code=False
        )
        (answer,) = pipeline(
            prompt, min_new_tokens=5, max_new_tokens=5, do_sample=False, return_tensors=True
        )
        sequence = answer["generated_token_ids"]
        asked = pipeline.tokenizer(prompt)["input_ids"]
    else:
        import onnxruntime_genai as og

        model = og.Model(str(prepared.onnx_dir))
        asked = og.Tokenizer(model).encode(prompt)
        settings = og.GeneratorParams(model)
        settings.set_search_options(
            min_length=len(asked) + 5, max_length=len(asked) + 5, do_sample=False
        )
        generator = og.Generator(model, settings)
        generator.append_tokens(asked)
        while not generator.is_done():
            generator.generate_next_token()
        sequence = generator.get_sequence(0)
    print(f"tokens: {len(sequence) - len(asked)}")


if __name__ == "__main__":
    _generate(sys.argv[1])

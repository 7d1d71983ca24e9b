"""Generates five tokens on tiny-phi3 through both tracks, each in a process of its own, for ``course.doctor.checks``.

A processor without an instruction or a broken library ends a process: that one, and not the one
that asks.
"""

import os
import re
import signal
import subprocess
import sys
import time

from helpers.models.steps import last_line
from helpers.paths import ROOT, model_cache

TRACK_PATIENCE = 120  # seconds


def smoke():
    """Yield a line for each track, once it has generated five tokens in a process of its own."""
    code, said = _run("helpers", "prepare", "--model", "tiny-phi3")
    if code:
        told = re.search(r"^error: (.*)\n +(.*)$", said, re.MULTILINE)
        yield (
            ("FAIL", *told.groups())
            if told
            else (
                "FAIL",
                "tiny-phi3 could not be prepared, or another process is at it",
                "Wait for the other process, and run: python -m helpers prepare --model tiny-phi3",
            )
        )
        return
    for name, track in (("A", "transformers"), ("B", "onnx")):
        begun = time.perf_counter()
        code, said = _run("course.doctor.smoke", track)
        if code == 0 and "tokens: 5\n" in said:
            seconds = time.perf_counter() - begun
            yield (
                "OK",
                f"track {name} generated 5 tokens on tiny-phi3 in {seconds:.0f} s, loading included",
                "",
            )
        else:
            yield _failure(name, code, said)


def _run(*words):
    """Run one of the course's modules; return its exit code, and what it printed."""
    try:
        tried = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TRACK_PATIENCE,
            encoding="utf-8",
            errors="replace",
            env=dict(os.environ, PYTHONUTF8="1"),
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer in {TRACK_PATIENCE} s"
    return tried.returncode, tried.stdout


def _failure(track, code, said):
    """Return the line on a track's process that ended with ``code``: a signal where it is negative."""
    last = last_line(said) if said.strip() else "nothing"
    fix = (
        f"Delete {model_cache() / 'tiny-phi3'} and run this again; "
        "if it stays, delete .venv and run: python -m helpers setup"
    )
    # Windows has no signals, and large codes.
    name = (
        signal.Signals(-code).name
        if code < 0
        else f"exit code {code:#x}"
        if code > 255
        else f"exit code {code}"
    )
    if name == "SIGILL" or code == 0xC000001D:
        fix = "This processor lacks an instruction that the track's library needs: use another machine."
    elif name == "SIGKILL":
        fix = "The system ended it, most often for want of memory: close programs, or give the container more."
    elif "DLL load failed" in said:
        fix = (
            "Install Microsoft's Visual C++ Redistributable, https://aka.ms/vs/17/release/vc_redist.x64.exe; "
            "if it is there, delete .venv and run: python -m helpers setup"
        )
    return (
        "FAIL",
        f"track {track} did not generate on tiny-phi3: {name}; it printed last: {last}",
        fix,
    )


def _generate(track):
    """Generate five tokens on tiny-phi3, in this process, and print how many came."""
    from helpers.models.prepare import prepare_model

    prepared, prompt = prepare_model("tiny-phi3"), "The capital of Spain is"
    if track == "transformers":
        import transformers

        pipeline = transformers.pipeline(
            prepared.entry.task, model=str(prepared.transformers_dir), trust_remote_code=False
        )
        (answer,) = pipeline(
            prompt, min_new_tokens=5, max_new_tokens=5, do_sample=False, return_tensors=True
        )
        sequence, asked = answer["generated_token_ids"], pipeline.tokenizer(prompt)["input_ids"]
    else:
        import onnxruntime_genai as og

        model = og.Model(str(prepared.onnx_dir))
        asked, settings = og.Tokenizer(model).encode(prompt), og.GeneratorParams(model)
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

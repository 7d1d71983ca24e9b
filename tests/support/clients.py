"""What the tests of OpenAI's clients share: a script for each client, and the table of docs/serving.md.

A script runs in a process that reaches this machine alone. A test fails where the table is not what
its calls came to, and prints the rows to put there.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from support import ROOT

TOKEN = "a token of this test's"
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
}
# What each script begins and ends with: it prints what its calls came to.
HARNESS = """
import json, sys
from importlib.metadata import version
address, model, token = sys.argv[1:]
said = {}
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sky is"}]

def call(name, ask):
    try:
        said[name] = ask()
    except Exception as error:
        parts = [getattr(error, part, None) for part in ("param", "code")]
        said[name] = f"{type(error).__name__}: " + ", ".join(part for part in parts if isinstance(part, str))

def text(value):
    assert isinstance(value, str) and value, repr(value)
    return "text"

def chunks(texts):
    texts = [part for part in texts if part]
    assert texts
    return "one chunk" if len(texts) == 1 else "chunks"
"""
SCRIPTS = {
    "openai": """
        import asyncio
        from typing import Literal
        import openai
        from pydantic import BaseModel

        class Answer(BaseModel):
            mood: Literal["good", "bad"]
            sure: bool

        client = openai.OpenAI(base_url=address, api_key=token, max_retries=0)
        ask = client.chat.completions.create
        common = {"model": model, "messages": messages, "max_tokens": 8}

        def whole(**fields):
            return ask(**common | fields)

        def parse():
            answer = client.chat.completions.parse(**common | {"max_tokens": 60}, response_format=Answer)
            return type(answer.choices[0].message.parsed).__name__

        def turns():
            first = whole().choices[0].message
            more = [*messages, first, {"role": "user", "content": "And?"}]
            return text(whole(messages=more).choices[0].message.content)

        def usage():
            *_, last = whole(stream=True, stream_options={"include_usage": True})
            assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
            return "tokens counted"

        def seeded():
            one, two = (whole(seed=5, temperature=1.0).choices[0].message.content for _ in range(2))
            assert one == two
            return "the same twice"

        async def in_async(stream):
            async with openai.AsyncOpenAI(base_url=address, api_key=token, max_retries=0) as client:
                answer = await client.chat.completions.create(**common, stream=stream)
                if stream:
                    return chunks([part.choices[0].delta.content async for part in answer])
                return text(answer.choices[0].message.content)

        def stop():
            whole_text = whole().choices[0].message.content
            cut = whole(stop=[whole_text[2]]).choices[0].message.content
            return "text before it" if whole_text.startswith(cut) and whole_text[2] not in cut else "not cut there"

        call("chat", lambda: text(whole().choices[0].message.content))
        call("async chat", lambda: asyncio.run(in_async(False)))
        call("several turns", turns)
        call("parts of text", lambda: text(whole(messages=[{"role": "user", "content": [
            {"type": "text", "text": "The sky is"}]}]).choices[0].message.content))
        call("stream", lambda: chunks([part.choices[0].delta.content for part in whole(stream=True)]))
        call("async stream", lambda: asyncio.run(in_async(True)))
        call("usage of a stream", usage)
        call("models", lambda: text(client.models.list().data[0].id))
        call("n=2", lambda: f"{len(whole(n=2, temperature=1.0, seed=1).choices)} answers")
        call("seed", seeded)
        call("stop", stop)
        call("parse", parse)
        call("temperature=9", lambda: whole(temperature=9))
        call("another model", lambda: whole(model="gpt-4.1"))
        call("a wrong token", lambda: openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list())
        """,
    "litellm": """
        import asyncio
        import litellm
        common = {"model": f"openai/{model}", "api_base": address, "api_key": token, "messages": messages,
                  "max_tokens": 8, "num_retries": 0}
        call("completion", lambda: text(litellm.completion(**common).choices[0].message.content))
        call("acompletion", lambda: text(asyncio.run(litellm.acompletion(**common)).choices[0].message.content))
        call("completion(stream=True)", lambda: chunks(
            [part.choices[0].delta.content for part in litellm.completion(**common, stream=True)]))
        """,
    "langchain-openai": """
        from typing import Literal
        from langchain_openai import ChatOpenAI
        from pydantic import BaseModel

        class Answer(BaseModel):
            mood: Literal["good", "bad"]

        chat = ChatOpenAI(model=model, base_url=address, api_key=token, max_tokens=40, max_retries=0)
        pairs = [(one["role"].replace("user", "human"), one["content"]) for one in messages]
        call("invoke", lambda: text(chat.invoke(pairs).content))
        call("stream", lambda: chunks([part.content for part in chat.stream(pairs)]))
        call("with_structured_output", lambda: type(chat.with_structured_output(Answer).invoke(pairs)).__name__)
        """,
    "llama-index-llms-openai-like": """
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.openai_like import OpenAILike
        chat = OpenAILike(model=model, api_base=address, api_key=token, is_chat_model=True, context_window=2048,
                          max_tokens=8, max_retries=0)
        turns = [ChatMessage(**one) for one in messages]
        call("complete", lambda: text(chat.complete("The sky is").text))
        call("chat", lambda: text(chat.chat(turns).message.content))
        call("stream_chat", lambda: chunks([part.delta for part in chat.stream_chat(turns)]))
        """,
}


def run_script(
    client: str, server, folder: Path, python: str | Path = sys.executable
) -> tuple[dict, str]:
    """Return what a client's calls came to on a server, and its version; it may reach this machine alone."""
    script = folder / "script.py"
    end = f"print(json.dumps([said, version({client!r})]))\n"
    script.write_text(f"{HARNESS}\n{textwrap.dedent(SCRIPTS[client])}\n{end}", encoding="utf-8")
    refused = folder / "refused.log"
    variables = QUIET | {
        "PYTHONPATH": str(ROOT / "tests" / "support" / "no_network"),
        "REFUSED_LOG": str(refused),
    }
    variables |= {
        name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ
    }
    result = subprocess.run(
        [python, str(script), f"{server.address}/v1", "model", TOKEN],
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert not refused.exists(), refused.read_text(encoding="utf-8")
    return json.loads(result.stdout.splitlines()[-1])


def check_script(
    client: str, onnx, transformers, folder: Path, python: str | Path = sys.executable
) -> None:
    """See that the document has what the calls of a client come to on the servers of both tracks."""
    found = [run_script(client, server, folder, python) for server in (onnx, transformers)]
    see_in_document(client, rows_of(client, found[0][1], *(calls for calls, _ in found)))


def check_curl(onnx, transformers) -> None:
    """See that the document has what curl gets from the servers of both tracks."""
    found = []
    for server in (onnx, transformers):
        said = {}
        for call, options in (("curl", []), ("curl -N", ["-N"])):
            asked = {
                "messages": [{"role": "user", "content": "The sky is"}],
                "max_tokens": 8,
                "stream": bool(options),
            }
            result = subprocess.run(
                [
                    "curl",
                    "-sS",
                    *options,
                    f"{server.address}/v1/chat/completions",
                    "-H",
                    f"Authorization: Bearer {TOKEN}",
                    "-d",
                    json.dumps(asked),
                ],
                capture_output=True,
                text=True,
                encoding="utf-8",
                check=True,
            )
            if options:
                *events, done = [line for line in result.stdout.split("\n\n") if line]
                assert done == "data: [DONE]"
                texts = [
                    choice["delta"].get("content")
                    for event in events
                    for choice in json.loads(event.removeprefix("data: "))["choices"]
                ]
                said[call] = "one chunk" if len(list(filter(None, texts))) == 1 else "chunks"
            else:
                said[call] = (
                    "text"
                    if json.loads(result.stdout)["choices"][0]["message"]["content"]
                    else "nothing"
                )
        found.append(said)
    see_in_document("curl", rows_of("curl", "", *found))


def rows_of(client, version, *tracks):
    """Return the table's rows: calls that came to the same stand in one."""
    calls = {}
    for name in tracks[0]:
        calls.setdefault(" | ".join(track[name] for track in tracks), []).append(name)
    head = f"| {client} {version}".rstrip()
    return [f"{head} | {', '.join(names)} | {came_to} |" for came_to, names in calls.items()]


def see_in_document(client, rows):
    """See that the document has these rows of a client, and no others."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- clients -->\n(.*?)<!-- /clients -->", text, re.DOTALL)[1]
    kept = [line for line in table.splitlines() if line.startswith(f"| {client} ")]
    assert kept == rows, "put these rows between the marks of docs/serving.md:\n" + "\n".join(rows)

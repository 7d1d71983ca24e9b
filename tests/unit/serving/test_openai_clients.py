"""What OpenAI's clients get from the server, each in a process that reaches this machine alone.

A test fails where the table in docs/serving.md is not what it found, and prints the rows to put there.

Run: python -m helpers test tests/unit/serving/test_openai_clients.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import mlflow
import openai
import pytest
import transformers
from huggingface_hub import ModelCard
from support import ROOT, run_python, stand_ins
from support.chat import chat_model_for
from support.service import raw, running, wait_for

from helpers.operations.programs import start_program

TOKEN = "a token of this test's"
NAMES = ("slm-onnx", "slm-transformers")
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false"}
# What each script begins and ends with: it prints what its calls came to.
HARNESS = '''
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
'''
SCRIPTS = {
    "openai": '''
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
        ''',
    "litellm": '''
        import asyncio
        import litellm
        common = {"model": f"openai/{model}", "api_base": address, "api_key": token, "messages": messages,
                  "max_tokens": 8, "num_retries": 0}
        call("completion", lambda: text(litellm.completion(**common).choices[0].message.content))
        call("acompletion", lambda: text(asyncio.run(litellm.acompletion(**common)).choices[0].message.content))
        call("completion(stream=True)", lambda: chunks(
            [part.choices[0].delta.content for part in litellm.completion(**common, stream=True)]))
        ''',
    "langchain-openai": '''
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
        ''',
    "llama-index-llms-openai-like": '''
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.openai_like import OpenAILike
        chat = OpenAILike(model=model, api_base=address, api_key=token, is_chat_model=True, context_window=2048,
                          max_tokens=8, max_retries=0)
        turns = [ChatMessage(**one) for one in messages]
        call("complete", lambda: text(chat.complete("The sky is").text))
        call("chat", lambda: text(chat.chat(turns).message.content))
        call("stream_chat", lambda: chunks([part.delta for part in chat.stream_chat(turns)]))
        ''',
}


@pytest.fixture(scope="module")
def servers(tiny, empty_database, tmp_path_factory):
    """Start the program on each track's model out of a registry; return their addresses."""
    folder = tmp_path_factory.mktemp("clients")
    shutil.copy(empty_database, folder / "mlflow.db")
    before, store = mlflow.get_tracking_uri(), "sqlite:///" + (folder / "mlflow.db").as_posix()
    mlflow.set_tracking_uri(store)
    experiment = mlflow.create_experiment("clients", (folder / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    pipeline = transformers.pipeline("text-generation", model=str(tiny.transformers_dir), device="cpu")
    logged = [
        mlflow.pyfunc.log_model(name=NAMES[0], **chat_model_for(tiny)),
        mlflow.transformers.log_model(pipeline, name=NAMES[1], task="llm/v1/chat", pip_requirements=["mlflow"],
                                      model_config={"max_new_tokens": 8, "do_sample": False},
                                      model_card=ModelCard("A toy."))]
    programs = []
    try:
        for name, model in zip(NAMES, logged, strict=True):
            version = mlflow.register_model(model.model_uri, name)
            mlflow.MlflowClient().set_registered_model_alias(name, "champion", version.version)
            programs.append(start_program(
                [sys.executable, str(ROOT / "serving" / "openai_server.py"), "--model", f"models:/{name}@champion",
                 "--port", "0"], rf"^Serving {name}, version 1, at (\S+)$", folder / f"{name}.log",
                MLFLOW_TRACKING_URI=store, SERVE_TOKEN=TOKEN))
        yield dict(zip(NAMES, (program.address for program in programs), strict=True))
    finally:
        mlflow.set_tracking_uri(before)
        for program in programs:
            program.stop()


def run_script(client, address, model, folder, python=sys.executable):
    """Return what a client's calls came to, and its version; it may reach this machine alone."""
    script = folder / "script.py"
    end = f"print(json.dumps([said, version({client!r})]))\n"
    script.write_text(f"{HARNESS}\n{textwrap.dedent(SCRIPTS[client])}\n{end}", encoding="utf-8")
    refused = folder / "refused.log"
    variables = QUIET | {"PYTHONPATH": str(ROOT / "tests" / "support" / "no_network"), "REFUSED_LOG": str(refused)}
    variables |= {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    result = subprocess.run([python, str(script), address, model, TOKEN], env=variables, cwd=folder,
                            capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr[-2000:]
    assert not refused.exists(), refused.read_text(encoding="utf-8")
    return json.loads(result.stdout.splitlines()[-1])


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


@pytest.mark.slow
@pytest.mark.parametrize("client", ["openai", "litellm", "langchain-openai"])
def test_what_a_clients_calls_come_to(client, servers, tmp_path):
    found = [run_script(client, servers[name], name, tmp_path) for name in NAMES]
    see_in_document(client, rows_of(client, found[0][1], *(calls for calls, _ in found)))


@pytest.mark.index
@pytest.mark.slow
def test_what_llama_indexs_calls_come_to(servers, tmp_path):
    """Run it in an environment of its own: it takes no openai as new as the course's."""
    client, uv = "llama-index-llms-openai-like", [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "environment"], check=True)
    python = tmp_path / "environment" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, f"{client}==0.8.1"], check=True)
    found = [run_script(client, servers[name], name, tmp_path, python) for name in NAMES]
    see_in_document(client, rows_of(client, found[0][1], *(calls for calls, _ in found)))


@pytest.mark.slow
def test_what_llm_says(servers, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text("".join(
        f"- {{model_id: {name}, model_name: {name}, api_key_name: course, api_base: \"{servers[name]}\"}}\n"
        for name in NAMES), encoding="utf-8")
    found = []
    for name in NAMES:
        said = {}
        for call, options in (("llm -m NAME", []), ("llm -m NAME --no-stream", ["--no-stream"])):
            result = run_python(tmp_path, "-m", "llm", "-m", name, "The sky is", "--key", TOKEN, "-o", "max_tokens",
                                "8", "--no-log", *options, network=False, LLM_USER_PATH=str(tmp_path))
            assert result.returncode == 0, result.stderr
            said[call] = "text" if result.stdout.strip() else "nothing"
        found.append(said)
    version = run_python(tmp_path, "-c", "from importlib.metadata import version; print(version('llm'))").stdout.strip()
    see_in_document("llm", rows_of("llm", version, *found))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="2026-11-28: needs curl")
def test_what_curl_gets(servers):
    found = []
    for name in NAMES:
        said = {}
        for call, options in (("curl", []), ("curl -N", ["-N"])):
            body = {"messages": [{"role": "user", "content": "The sky is"}], "max_tokens": 8, "stream": bool(options)}
            result = subprocess.run(["curl", "-sS", *options, f"{servers[name]}/chat/completions", "-H",
                                     f"Authorization: Bearer {TOKEN}", "-d", json.dumps(body)],
                                    capture_output=True, text=True, encoding="utf-8", check=True)
            if options:
                *events, done = [line for line in result.stdout.split("\n\n") if line]
                assert done == "data: [DONE]"
                texts = [choice["delta"].get("content") for event in events
                         for choice in json.loads(event.removeprefix("data: "))["choices"]]
                said[call] = "one chunk" if len(list(filter(None, texts))) == 1 else "chunks"
            else:
                said[call] = "text" if json.loads(result.stdout)["choices"][0]["message"]["content"] else "nothing"
        found.append(said)
    see_in_document("curl", rows_of("curl", "", *found))


def test_a_full_line_is_a_rate_limit_error_after_the_clients_own_retries(tmp_path):
    with running(stand_ins.save(tmp_path / "a", "Streams"), concurrent=1, waiting=1) as server:
        before = [server.connect(raw(json.dumps({"messages": [{"role": "user", "content": "gated 1"}]}).encode()))
                  for _ in range(2)]
        wait_for(lambda: server.requests() == (1, 1))
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=1) as client:
            with pytest.raises(openai.RateLimitError) as refusal:
                client.chat.completions.create(model="model", messages=[{"role": "user", "content": "words 1"}])
            assert refusal.value.code == "busy"
            assert server.count("slm_requests_total", outcome="busy") == 2
            server.model.gate.release(2)
            wait_for(lambda: server.requests() == (0, 0))
            answer = client.chat.completions.create(model="model", messages=[{"role": "user", "content": "words 1"}])
            assert answer.choices[0].message.content == "word "
        for connection in before:
            connection.close()


def test_the_real_model_answers_in_words_and_fits_a_class(smol, tmp_path):
    folder = tmp_path / "model"
    mlflow.pyfunc.save_model(folder, **chat_model_for(smol))
    asked = {"model": "model", "max_tokens": 32, "messages": [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "What is the capital of Spain?"}]}
    with running(folder) as server, openai.OpenAI(base_url=f"{server.address}/v1", api_key="none") as client:
        whole = client.chat.completions.create(**asked).choices[0].message.content
        assert "Madrid" in whole
        streamed = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(filter(None, streamed)) == whole
        assert len(streamed) > 3

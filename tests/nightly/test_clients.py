"""What other clients of OpenAI's interface get from the server, each in a process that reaches this machine alone.

Run: python -m helpers test tests/nightly/test_clients.py
"""

import os
import subprocess
import sys

import mlflow
import pytest
from support import clients, run_python
from support.chat import chat_model_for
from support.service import running, save_pipeline


@pytest.fixture(scope="module")
def servers(tiny, tmp_path_factory):
    """Serve each track's model."""
    folder = tmp_path_factory.mktemp("clients")
    mlflow.pyfunc.save_model(folder / "onnx", **chat_model_for(tiny))
    save_pipeline(tiny, folder / "transformers", max_new_tokens=8, do_sample=False)
    with (
        running(folder / "onnx", token=clients.TOKEN, name="model") as onnx,
        running(folder / "transformers", token=clients.TOKEN) as transformers,
    ):
        yield onnx, transformers


@pytest.mark.parametrize("client", ["litellm", "langchain-openai"])
def test_what_a_clients_calls_come_to(client, servers, tmp_path):
    clients.check_script(client, *servers, tmp_path)


def test_what_llama_indexs_calls_come_to(servers, tmp_path):
    """Run it in an environment of its own: it takes no openai as new as the course's."""
    client = "llama-index-llms-openai-like"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run(
        [*uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "environment"], check=True
    )
    python = tmp_path / "environment" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run(
        [*uv, "pip", "install", "--quiet", "--python", python, f"{client}==0.8.1"], check=True
    )
    clients.check_script(client, *servers, tmp_path, python)


def test_what_llm_says(servers, tmp_path):
    names = ("slm-onnx", "slm-transformers")
    (tmp_path / "extra-openai-models.yaml").write_text(
        "".join(
            f'- {{model_id: {name}, model_name: model, api_key_name: course, api_base: "{server.address}/v1"}}\n'
            for name, server in zip(names, servers, strict=True)
        ),
        encoding="utf-8",
    )
    found = []
    for name in names:
        said = {}
        for call, options in (("llm -m NAME", []), ("llm -m NAME --no-stream", ["--no-stream"])):
            result = run_python(
                tmp_path,
                "-m",
                "llm",
                "-m",
                name,
                "The sky is",
                "--key",
                clients.TOKEN,
                "-o",
                "max_tokens",
                "8",
                "--no-log",
                *options,
                network=False,
                LLM_USER_PATH=str(tmp_path),
            )
            assert result.returncode == 0, result.stderr
            said[call] = "text" if result.stdout.strip() else "nothing"
        found.append(said)
    version = run_python(
        tmp_path, "-c", "from importlib.metadata import version; print(version('llm'))"
    ).stdout.strip()
    clients.see_in_document("llm", clients.rows_of("llm", version, *found))

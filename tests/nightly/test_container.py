"""What the image would run: its requirements installed by hash, and its program by its own ENTRYPOINT in namespaces.

Run: python -m helpers nightly tests/nightly/test_container.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import mlflow
import pytest
from support import ROOT, stand_ins
from support.chat import LONG, chat_model_for
from support.container import (
    IMAGE,
    OPTIONS,
    PROBES,
    REQUIREMENTS,
    TOKEN,
    manifest_args,
    not_windows,
    options_of,
)
from support.jupyter import server
from support.namespaces import DEVICES, WRITABLE, Image, answers, lacking
from support.service import body, wait_for

from serving.service import command_line

CALLER = {"Host": "slm:80", "Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Install the image's requirements as the image does: by hash, from wheels, into an empty environment."""
    folder = tmp_path_factory.mktemp("image") / "venv"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    subprocess.run(
        [
            *uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            folder / "bin" / "python",
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--requirement",
            REQUIREMENTS,
        ],
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """Save the chat model on the tiny one, as a folder that somebody mounts."""
    folder = tmp_path_factory.mktemp("model") / "model"
    mlflow.pyfunc.save_model(folder, **chat_model_for(tiny))
    return folder


@pytest.fixture(scope="module")
def namespaces():
    """Skip where there are none, before anything is installed."""
    if reason := lacking():
        pytest.skip(f"2026-11-28: {reason}")


def program_files():
    """Return the course's files in the image, by where they are there."""
    copied = [
        [word for word in value.split() if not word.startswith("--")] for value in IMAGE.all("COPY")
    ]
    return {
        f"{target}{file.name}": file
        for *sources, target in copied
        if sources != [target]
        for source in sources
        for file in ROOT.glob(source)
    }


@pytest.fixture(scope="module")
def contained(namespaces, environment):
    """Return a function that makes the image with a model's folder mounted."""

    def image(folder, **variables):
        files = {"/opt/venv": environment} | program_files()
        variables = IMAGE.variables() | {command_line.TOKEN: TOKEN} | variables
        return Image(
            files | {options_of().model: folder}, variables, IMAGE.one("USER"), IMAGE.one("WORKDIR")
        )

    return image


def from_docker():
    return [*IMAGE.words("ENTRYPOINT"), *IMAGE.words("CMD")]


def from_kubernetes():
    return [*IMAGE.words("ENTRYPOINT"), *manifest_args()]


PORT = options_of().port
LISTENS = r"http://127\.0\.0\.1:[1-9]\d*"
CHAT = {"path": "/v1/chat/completions", "method": "POST", "headers": CALLER}


def test_it_serves_without_rights_on_a_root_that_is_read_only(contained, model, tmp_path):
    with contained(model).running(tmp_path, from_kubernetes()) as program:
        program.wait("Serving")
        status, text = program.ask(PORT, **CHAT, body=body("The sky is", max_tokens=5).decode())
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 5
        for host in options_of(*manifest_args()).allowed_host:
            assert (
                program.ask(PORT, "/v1/models", headers=CALLER | {"Host": f"{host}:80"})[0] == 200
            )
        assert program.ask(PORT, "/v1/models", headers=CALLER | {"Host": "stranger"})[0] == 421
        assert program.ask(PORT, "/v1/models", headers={"Host": "slm"})[0] == 401
        assert program.ask(PORT, "/metrics", headers=CALLER)[1].count("slm_model_version{") == 1
        for probe in PROBES.values():
            assert program.ask(PORT, probe["path"], headers={"Host": "10.1.2.3:8000"})[0] == 200
        check = program.enter([sys.executable, *IMAGE.words("HEALTHCHECK")[1:]])
        assert check.wait() == 0
        # A right would stand in one of these masks.
        proc = Path(f"/proc/{program.process().pid}")
        masks = dict(
            line.split(":\t")
            for line in (proc / "status").read_text().splitlines()
            if line.startswith("Cap")
        )
        assert {masks[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        assert (proc / "uid_map").read_text().split()[0] == IMAGE.one("USER").split(":")[0]
        assert "NoNewPrivs:\t1" in (proc / "status").read_text()
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
        writable = {mount[4] for mount in mounts if "rw" in mount[5].split(",")}
        assert {
            place for place in writable if not place.startswith(("/proc", "/sys", *DEVICES))
        } == set(WRITABLE)
        said = program.said()
        assert said.splitlines() == [f"Serving slm-onnx, version 1, at http://0.0.0.0:{PORT}/v1"], (
            said
        )


def test_what_the_program_may_not_do_there(contained, model, tmp_path):
    image = contained(model)
    for number, folder in enumerate(["/", "/app", "/model", "/opt/venv", "/usr"]):
        tried = image.run(tmp_path / f"{number}", ["touch", f"{folder}/file"])
        assert tried.returncode == 1 and "Read-only file system" in tried.stderr
    assert image.run(tmp_path / "tmp", ["touch", "/tmp/file"]).returncode == 0
    assert image.run(tmp_path / "id", ["id", "-u"]).stdout == IMAGE.one("USER").split(":")[0] + "\n"
    assert image.run(tmp_path / "mount", ["mount", "-t", "tmpfs", "tmpfs", "/tmp"]).returncode != 0
    networks = image.run(tmp_path / "net", ["cat", "/proc/self/net/dev"]).stdout
    assert re.findall(r"^ *(\w+):", networks, re.MULTILINE) == ["lo"]
    assert image.run(tmp_path / "ls", ["ls", "/"]).stdout.split() == sorted(
        {
            "app",
            "bin",
            "dev",
            "etc",
            "lib",
            "lib64",
            "model",
            "opt",
            "proc",
            "sbin",
            "sys",
            "tmp",
            "usr",
            Path(sys.base_prefix).parts[1],
        }
    )


def test_sigterm_under_load_ends_what_was_begun_and_then_the_program(
    contained, model, tmp_path, record_property
):
    with contained(model).running(tmp_path, from_kubernetes()) as program:
        program.wait("Serving")
        long = LONG | {"max_tokens": 1000}
        asked = [
            CHAT | {"body": body(f"{number}", stream=number % 2 == 0, **long).decode()}
            for number in range(16)
        ]
        client = program.begin(PORT, asked)
        metrics = {"path": "/metrics", "headers": CALLER}
        wait_for(
            lambda: "slm_requests_running 16.0" in program.ask(PORT, **metrics)[1],
            "16 requests at work",
        )
        program.process().send_signal(signal.SIGTERM)
        came = answers(client)
        for number, (status, text) in enumerate(came):
            assert status == 200, text
            if number % 2 == 0:
                assert text.endswith("data: [DONE]\n\n")
                assert '"error"' not in text
            else:
                assert json.loads(text)["choices"][0]["finish_reason"] == "length"
        assert program.shell.wait(60) == 0
        record_property("answers that SIGTERM found begun, all whole", len(came))
        assert len(program.said().splitlines()) == 1, program.said()


def test_a_pod_that_loads_its_model_lives_and_is_not_ready(contained, tmp_path):
    thinks = stand_ins.save(tmp_path / "model", "Thinks")
    with contained(thinks).running(tmp_path, from_kubernetes()) as program:
        program.wait("thinking")  # it has a model, and waits for its first word
        assert program.ask(PORT, "/health") == (200, '{"status":"ok"}')
        status, text = program.ask(PORT, "/ready")
        assert status == 503 and json.loads(text)["error"]["code"] == "loading"
        program.process().send_signal(signal.SIGTERM)
        assert program.shell.wait(60) == 0


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {command_line.TOKEN: OPTIONS["secret.yaml"]["stringData"]["token"]},
            "the service has no token",
        ),
        ({}, "does not load"),
    ],
)
def test_what_the_program_says_where_it_cannot_begin(variables, says, contained, tmp_path):
    (tmp_path / "empty").mkdir()
    ended = contained(tmp_path / "empty", **variables).run(tmp_path, from_docker())
    assert ended.returncode == 1 and says in ended.stderr
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 2


@not_windows
def test_the_images_packages_serve_a_model_of_a_tracking_server(
    environment, tiny, empty_database, tmp_path
):
    shutil.copy(empty_database, tmp_path / "server.db")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--workers",
        "1",
    ]
    local = {
        "no_proxy": "127.0.0.1",
        "TMPDIR": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with server(command, os.environ | local, tmp_path / "tracking.log", LISTENS) as tracking:
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(tracking)
        try:
            experiment = mlflow.create_experiment("container")
            mlflow.set_experiment(experiment_id=experiment)
            logged = mlflow.pyfunc.log_model(name="slm-onnx", **chat_model_for(tiny))
            version = mlflow.register_model(logged.model_uri, "slm-onnx")
            mlflow.MlflowClient().set_registered_model_alias(
                "slm-onnx", "champion", version.version
            )
        finally:
            mlflow.set_tracking_uri(before)
        _, *words = IMAGE.words("ENTRYPOINT")
        words = [
            str(environment / "bin" / "python"),
            *words,
            "--model",
            "models:/slm-onnx@champion",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        for place, file in program_files().items():
            copy = tmp_path / place.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        variables = (
            IMAGE.variables()
            | local
            | {
                "HOME": str(tmp_path),
                "MLFLOW_TRACKING_URI": tracking,
                "PYTHONPATH": str(tmp_path / "app"),
                command_line.TOKEN: TOKEN,
            }
        )
        with server(words, variables, tmp_path / "program.log", LISTENS) as address:
            answer = httpx.post(
                f"{address}/v1/chat/completions",
                content=body("The sky is", max_tokens=5),
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=60,
                trust_env=False,
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["system_fingerprint"] == "slm-onnx/1"
        said = (tmp_path / "program.log").read_text(encoding="utf-8")
        assert said.splitlines() == [f"Serving slm-onnx, version 1, at {address}/v1"]

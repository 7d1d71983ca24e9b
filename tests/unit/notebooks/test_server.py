"""The pages on a tracking server: two of them at the same moment on a fresh one, and what they leave behind.

Run: python -m helpers test tests/unit/notebooks/test_server.py
"""

import os
import subprocess
import sys

import psutil
import pytest
from mlflow import MlflowClient
from support import OURS, ROOT, TRACKS
from support.jupyter import server

from helpers.paths import BUILD


@pytest.fixture
def tracking_server(tmp_path):
    """Start MLflow's own server on an empty database, and give its host and port."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
               "--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", "0"]
    with server(command, dict(os.environ), tmp_path / "server.log", r"http://127\.0\.0\.1:[1-9]\d*") as address:
        yield address.removeprefix("http://")


@pytest.mark.slow
def test_two_pages_at_the_same_moment_on_a_fresh_server_leave_their_models_there_and_nothing_here(
        tracking_server, tmp_path):
    (tmp_path / "temporary").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    environment |= {"TMPDIR": str(tmp_path / "temporary"), "no_proxy": "127.0.0.1"}
    begun = {page: subprocess.Popen(
        [sys.executable, "-m", "helpers", "notebook", page, "--output", str(tmp_path / "pages"), "-p", "model",
         "tiny-phi3", "-p", "tracking_uri", f"http://ann:ses%40me@{tracking_server}"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for page in TRACKS}
    for page, process in begun.items():
        said, _ = process.communicate()
        assert process.returncode == 0, said
        written = "".join((tmp_path / "pages" / f"{page}{ending}").read_text("utf-8") for ending in (".ipynb", ".html"))
        assert tracking_server in written
        assert "ses%40me" not in written + said and "ses@me" not in written + said
    client = MlflowClient(f"http://{tracking_server}")
    for name in ("slm-transformers", "slm-onnx-prompt"):
        version = client.get_model_version_by_alias(name, "champion")
        assert list((tmp_path / "artifacts").rglob(f"{version.source.rpartition('/')[2]}/artifacts/MLmodel"))
    left = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert left == []
    # Other tests may run at this moment: what is theirs belongs to a process that is alive.
    assert [path for path in BUILD.glob("kernel-*")
            if not psutil.pid_exists(int(path.name.removeprefix("kernel-")))] == []

"""A large file is downloaded in pieces.

Run: python -m helpers test tests/nightly/test_download.py
"""

import subprocess
import sys

import pytest
from support import ROOT
from support.web_server import web_server

from helpers.files import sha256


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of a process")
def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from helpers.models.download import Download, File\n"
        "url, size, folder, digest = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]\n"
        "Download({'big': File(url, size, digest)}, folder, folder).fetch(['big'])\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for size in (1_000, 200_000_000):
        with (tmp_path / "big").open("wb") as file:
            file.truncate(size)
        digest = sha256(tmp_path / "big")
        got = tmp_path / str(size)
        got.mkdir()
        with web_server(tmp_path) as url:
            result = subprocess.run(
                [sys.executable, "-c", code, f"{url}/big", str(size), got, digest],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={"HF_HUB_OFFLINE": "0", "PATH": ""},
            )
        assert result.returncode == 0, result.stderr
        assert sha256(got / "big") == digest
        peaks.append(int(result.stdout.split()[-1]) / 1000)
    assert peaks[1] - peaks[0] < 60  # megabytes, of 200 more

"""What pip says of a package index whose certificate has run out, as a user reads it.

Run: python -m helpers nightly tests/nightly/test_pip.py
"""

import ssl
from datetime import timedelta

from support import refuses
from support.kits import only_wheels
from support.loopback_hub import LoopbackHub, certificate

from helpers.models.pip import download_wheel


def test_an_index_with_an_expired_certificate_says_what_the_clock_says(tmp_path, monkeypatch):
    file = certificate(tmp_path, timedelta(days=-20), timedelta(days=-10))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    hub = LoopbackHub(tmp_path, lambda server: context.wrap_socket(server, server_side=True))
    variables = only_wheels(tmp_path / "index") | {
        "PIP_NO_INDEX": "0",
        "PIP_INDEX_URL": f"{hub.url}/simple",
        "PIP_CERT": str(file),
        "PIP_RETRIES": "0",
    }
    for name, value in variables.items():
        if name.startswith("PIP_"):
            monkeypatch.setenv(name, value)
    with refuses("pip-certificate") as refusal:
        download_wheel("Downloading llm-words==1.0", "llm-words==1.0", tmp_path)
    hub.close()
    assert "this machine's clock says 2" in refusal.value.what
    assert "Set the clock if it is wrong" in refusal.value.fix

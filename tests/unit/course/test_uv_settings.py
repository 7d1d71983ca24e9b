"""What uv is told: to find packages where the user's pip does, or in a kit and nowhere else.

Run: python -m helpers test tests/unit/course/test_uv_settings.py
"""

import sys
from pathlib import Path

import pytest

from course.uv_settings import from_kit, kit_constraints, like_pip
from helpers.models.kit import Kit

ALWAYS = {"UV_NO_CONFIG": "1", "UV_INDEX_STRATEGY": "unsafe-best-match", "UV_SYSTEM_CERTS": "1"}
HOME = str(Path("~").expanduser())


def proxies(address):
    return {
        name: address
        for word in ("http", "https", "all")
        for name in (f"{word}_proxy", f"{word.upper()}_PROXY")
    }


@pytest.mark.parametrize(
    ("pip", "variables"),
    [
        (
            {"index-url": "https://name:p%40ss@index.example/simple"},
            {"UV_DEFAULT_INDEX": "https://name:p%40ss@index.example/simple"},
        ),
        ({"pypi-url": "https://index.example"}, {"UV_DEFAULT_INDEX": "https://index.example"}),
        (
            {"extra-index-url": "\nhttps://a.example\nfile:///opt/b"},
            {"UV_INDEX": "https://a.example file:///opt/b"},
        ),
        (
            {"find-links": "/opt/wheels ~/more https://c.example/page.html"},
            {"UV_FIND_LINKS": f"/opt/wheels,{Path(HOME) / 'more'},https://c.example/page.html"},
        ),
        (
            {"trusted-host": "a.example b.example:8443"},
            {"UV_INSECURE_HOST": "a.example b.example:8443"},
        ),
        ({"proxy": "http://proxy.example:3128"}, proxies("http://proxy.example:3128")),
        ({"cert": "~/ca.pem"}, {"SSL_CERT_FILE": str(Path(HOME) / "ca.pem")}),
        ({"client-cert": "/own.pem"}, {"SSL_CLIENT_CERT": "/own.pem"}),
        ({"keyring-provider": "import"}, {"UV_KEYRING_PROVIDER": "subprocess"}),
        ({"keyring-provider": "disabled"}, {"UV_KEYRING_PROVIDER": "disabled"}),
        ({"timeout": "2.5"}, {"UV_HTTP_TIMEOUT": "2"}),
        ({"default-timeout": "180"}, {"UV_HTTP_TIMEOUT": "180"}),
        ({"retries": "1"}, {"UV_HTTP_RETRIES": "1"}),
        ({"cache-dir": "/cache"}, {"UV_CACHE_DIR": str(Path("/cache/uv"))}),
        ({"no-cache-dir": "true"}, {"UV_NO_CACHE": "1"}),
        ({"no-cache-dir": "off"}, {}),
        ({"uploaded-prior-to": "2026-11-01"}, {"UV_EXCLUDE_NEWER": "2026-11-01"}),
        ({"require-hashes": "1"}, {"UV_REQUIRE_HASHES": "1"}),
        ({"no-input": "1", "use-feature": "fast-deps"}, {}),
    ],
    ids=str,
)
def test_each_setting_of_pip_has_its_variable_of_uv(pip, variables):
    assert like_pip(pip, {}) == (ALWAYS | variables, [])


@pytest.mark.parametrize(
    ("pip", "options"),
    [
        ({"no-index": "1"}, ["--no-index"]),
        ({"no-index": "0"}, []),
        (
            {"constraint": "/etc/a.txt /etc/b.txt"},
            ["--constraint", "/etc/a.txt", "--constraint", "/etc/b.txt"],
        ),
        ({"build-constraint": "/etc/a.txt"}, ["--build-constraint", "/etc/a.txt"]),
        ({"only-binary": "six,torch "}, ["--only-binary", "six", "--only-binary", "torch"]),
    ],
)
def test_what_uv_has_no_variable_for_is_an_option(pip, options):
    assert like_pip(pip, {}) == (ALWAYS, options)


@pytest.mark.parametrize(
    ("pip", "variables", "found"),
    [
        # uv's own variables of where packages come from win; those of where they go and which they are
        # stay away.
        (
            {"index-url": "https://pip.example"},
            {"UV_DEFAULT_INDEX": "https://uv.example"},
            {"UV_DEFAULT_INDEX": "https://uv.example"},
        ),
        (
            {"index-url": "https://pip.example"},
            {"UV_INDEX_URL": "https://uv.example"},
            {"UV_INDEX_URL": "https://uv.example"},
        ),
        (
            {},
            {"UV_INDEX_CORP_PASSWORD": "p", "UV_HTTP_TIMEOUT": "9"},
            {"UV_INDEX_CORP_PASSWORD": "p", "UV_HTTP_TIMEOUT": "9"},
        ),
        (
            {},
            {
                "UV_TARGET": "x",
                "UV_SYSTEM_PYTHON": "1",
                "UV_PYTHON": "3.9",
                "UV_OVERRIDE": "x",
                "UV_TORCH_BACKEND": "cu126",
                "UV_CONFIG_FILE": "x",
                "UV_NO_VERIFY_HASHES": "1",
                "UV_CONSTRAINT": "x",
            },
            {},
        ),
        # The rest of the environment stays, but for a proxy that pip is told to pass over, or to
        # replace.
        (
            {},
            {"PATH": "/bin", "HTTPS_PROXY": "http://a"},
            {"PATH": "/bin", "HTTPS_PROXY": "http://a"},
        ),
        ({"no-proxy-env": "1"}, {"HTTPS_PROXY": "http://a", "http_proxy": "http://a"}, {}),
        ({"proxy": "http://b"}, {"HTTPS_PROXY": "http://a"}, proxies("http://b")),
        # The certificates of the library with which pip speaks HTTP.
        (
            {},
            {"REQUESTS_CA_BUNDLE": "/r.pem"},
            {"REQUESTS_CA_BUNDLE": "/r.pem", "SSL_CERT_FILE": "/r.pem"},
        ),
        (
            {"cert": "/p.pem"},
            {"REQUESTS_CA_BUNDLE": "/r.pem", "SSL_CERT_FILE": "/s.pem"},
            {"REQUESTS_CA_BUNDLE": "/r.pem", "SSL_CERT_FILE": "/p.pem"},
        ),
    ],
)
def test_what_stays_of_the_users_own_variables(pip, variables, found):
    assert like_pip(pip, variables)[0] == ALWAYS | found


@pytest.mark.parametrize(
    ("address", "links", "direct"),
    [
        ("http://192.168.1.5:8750", "http://192.168.1.5:8750/wheels/index.html", "192.168.1.5"),
        ("https://kits.example.org", "https://kits.example.org/wheels/index.html", None),
        (
            str(Path("/media/Kit, für alle").resolve()),
            Path("/media/Kit, für alle/wheels").resolve().as_uri().replace(",", "%2C"),
            None,
        ),
    ],
)
def test_with_a_kit_uv_asks_it_and_nobody_else(address, links, direct):
    theirs = {
        "UV_DEFAULT_INDEX": "https://index.example",
        "UV_FIND_LINKS": "/opt",
        "UV_OFFLINE": "1",
    }
    variables, options = from_kit(
        Kit(address, {}), Path("c.txt"), theirs | {"UV_CACHE_DIR": "/cache", "no_proxy": "a"}
    )
    assert variables == {"UV_NO_CONFIG": "1", "UV_CACHE_DIR": "/cache", "UV_FIND_LINKS": links} | (
        {"NO_PROXY": direct, "no_proxy": direct} if direct else {"no_proxy": "a"}
    )
    assert options == [
        "--no-index",
        "--only-binary",
        ":all:",
        "--constraint",
        "c.txt",
        "--build-constraint",
        "c.txt",
    ]


@pytest.mark.parametrize(
    ("system", "torch"),
    [
        ("linux", "torch==2.13.0+cpu  --hash=sha256:l311 --hash=sha256:l312\n"),
        ("win32", "torch==2.13.0  --hash=sha256:w\n"),
    ],
)
def test_the_pins_carry_the_hashes_of_the_kits_wheels(monkeypatch, system, torch):
    monkeypatch.setattr(sys, "platform", system)
    files = {
        "wheels/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": "l311",
        "wheels/torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl": "l312",
        "wheels/torch-2.13.0-cp311-cp311-win_amd64.whl": "w",
        "wheels/Jupyter_Core-5.9.1-py3-none-any.whl": "j",
        "wheels/index.html": "i",
        "models/six-1.17.0-py3-none-any.whl": "m",
    }
    kit = Kit("/kit", files)
    lines = "# made\njupyter-core==5.9.1 ; os_name == 'nt'\nsix==1.17.0\ntorch==2.13.0\n"
    assert kit_constraints(kit, lines) == (
        f"jupyter-core==5.9.1 ; os_name == 'nt' --hash=sha256:j\nsix==1.17.0 \n{torch}"
    )

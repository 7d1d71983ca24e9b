"""Makes the environment and options that tell uv where packages are: where the user's pip finds them, or in a kit.

uv does not read pip's configuration, https://docs.astral.sh/uv/pip/compatibility. So pip's options
are translated into uv's variables, https://docs.astral.sh/uv/reference/environment.
This runs before any package is installed: it imports the standard library and modules that do the
same.
"""

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from helpers.models.kit import WHEELS_INDEX, Kit, local_address

# uv's variables that keep the user's values: how packages are downloaded and, without a kit, from
# where. Others could make uv install elsewhere (UV_TARGET, UV_SYSTEM_PYTHON), something else
# (UV_OVERRIDE, UV_TORCH_BACKEND) or nothing.
DOWNLOAD = r"UV_(CACHE_DIR|NO_CACHE|LINK_MODE|CONCURRENT_\w+|HTTP_\w+)"
INDEX = (
    r"UV_(DEFAULT_INDEX|INDEX|INDEX_\w+|EXTRA_INDEX_URL|FIND_LINKS|INSECURE_HOST|KEYRING_PROVIDER|SYSTEM_CERTS"
    r"|NATIVE_TLS|EXCLUDE_NEWER|OFFLINE)"
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def like_pip(pip: dict[str, str], variables: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the options with which uv finds packages where the user's pip finds them.

    ``pip`` has the values of pip's options by name, such as ``"index-url"``; ``variables`` is this
    process's environment. uv's own variables win over pip's options.
    """
    # Without its option cert, pip uses the variables of requests, its HTTP library.
    certificate = (
        pip.get("cert") or variables.get("REQUESTS_CA_BUNDLE") or variables.get("CURL_CA_BUNDLE")
    )
    translated = {
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # the best version of all indexes, as pip does
        "UV_SYSTEM_CERTS": "1",  # pip trusts what the system trusts
        "UV_DEFAULT_INDEX": pip.get("index-url") or pip.get("pypi-url"),
        "UV_INDEX": " ".join(_values(pip, "extra-index-url")),
        "UV_FIND_LINKS": ",".join(map(_expand_home, _values(pip, "find-links"))),
        "UV_INSECURE_HOST": " ".join(_values(pip, "trusted-host")),
        "UV_KEYRING_PROVIDER": _keyring(pip.get("keyring-provider")),
        "UV_HTTP_TIMEOUT": (pip.get("timeout") or pip.get("default-timeout") or "").partition(".")[
            0
        ],
        "UV_HTTP_RETRIES": pip.get("retries"),
        "UV_CACHE_DIR": "cache-dir" in pip and str(Path(_expand_home(pip["cache-dir"])) / "uv"),
        "UV_NO_CACHE": _is_on(pip, "no-cache-dir"),
        "UV_EXCLUDE_NEWER": pip.get("uploaded-prior-to"),
        "UV_REQUIRE_HASHES": _is_on(pip, "require-hashes"),
    }
    shared = {
        "SSL_CERT_FILE": certificate and _expand_home(certificate),
        "SSL_CLIENT_CERT": "client-cert" in pip and _expand_home(pip["client-cert"]),
        **dict.fromkeys(PROXIES, pip.get("proxy")),
    }
    ignored = PROXIES if _is_on(pip, "no-proxy-env") else ()
    kept = {
        name: value
        for name, value in _with_uv_variables(variables, f"{DOWNLOAD}|{INDEX}").items()
        if name not in ignored
    }
    if "UV_INDEX_URL" in kept:  # the older name of the same setting
        del translated["UV_DEFAULT_INDEX"]
    options = []
    for option in ("constraint", "build-constraint", "only-binary"):
        for value in _values(pip, option):
            options += [f"--{option}", value]
    if _is_on(pip, "no-index"):
        options.append("--no-index")
    return _without_empty(translated) | kept | _without_empty(shared), options


def from_kit(
    kit: Kit, constraints: Path, variables: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the options with which uv takes packages only from a kit.

    ``constraints`` is a file with the text that ``kit_constraints`` returns.
    """
    links = kit.place(WHEELS_INDEX) if kit.is_url else (Path(kit.address) / "wheels").as_uri()
    direct = {}
    if kit.is_url and local_address(kit.address):  # uv does not apply "*" to the number of a host
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), urlsplit(kit.address).hostname)
    return (
        _with_uv_variables(variables, DOWNLOAD)
        | direct
        | {"UV_FIND_LINKS": links.replace(",", "%2C")},
        [
            "--no-index",
            "--only-binary",
            ":all:",
            "--constraint",
            str(constraints),
            "--build-constraint",
            str(constraints),
        ],
    )


def kit_constraints(kit: Kit, constraints: str) -> str:
    """Return the lines of constraints.txt with the hashes of the kit's wheels, which uv then checks."""
    wheels = {}  # by project and version
    for name, digest in kit.files.items():
        if name.startswith("wheels/") and name.endswith(".whl"):
            project, version = name.removeprefix("wheels/").split("-")[:2]
            wheels.setdefault((_normal_name(project), version), []).append(digest)
    lines = []
    for line in constraints.splitlines():
        if not line or line.startswith("#"):
            continue
        pin, semicolon, marker = line.partition(";")
        project, version = pin.strip().split("==")
        # For Linux, the kit has torch's CPU build; for other systems, the build of the package index.
        if sys.platform == "linux" and (project, f"{version}+cpu") in wheels:
            version += "+cpu"
        hashes = "".join(
            f" --hash=sha256:{digest}"
            for digest in wheels.get((_normal_name(project), version), [])
        )
        lines.append(f"{project}=={version} {semicolon}{marker}{hashes}\n")
    return "".join(lines)


def _normal_name(project):
    """Return a project's name in its normal form, https://packaging.python.org/specifications/name-normalization."""
    return re.sub(r"[-_.]+", "-", project).lower()


def _with_uv_variables(variables, pattern):
    """Return the environment with only those of uv's variables that match a pattern, and without uv's files."""
    kept = {
        name: value
        for name, value in variables.items()
        if not name.upper().startswith("UV_") or re.fullmatch(pattern, name.upper())
    }
    return kept | {"UV_NO_CONFIG": "1"}


def _values(pip, option):
    """Return the values of an option that may have several: pip splits them at spaces, package names also at commas."""
    text = pip.get(option, "")
    return (
        re.split(r"[,\s]+", text.strip(", ")) if option == "only-binary" and text else text.split()
    )


def _expand_home(text):
    """Return a path with ``~`` expanded; a URL as it is."""
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _keyring(provider):
    """Return uv's name for pip's source of passwords: of pip's several, uv knows only the program ``keyring``."""
    return provider and ("disabled" if provider == "disabled" else "subprocess")


def _is_on(pip, option):
    """Return "1" if a switch of pip's is on, an empty text if it is off."""
    return "1" if pip.get(option, "").lower() in ("1", "y", "yes", "t", "true", "on") else ""


def _without_empty(settings):
    return {name: value for name, value in settings.items() if value}

"""A Hugging Face Hub on this machine's loopback, for the real client; it can be told to misbehave.

It serves folders: ``root/org/name/...``. https://huggingface.co/docs/hub/api and what the client
asks say how.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# Kept with Git LFS, as on the Hub.
LARGE = (".safetensors", ".data", ".onnx", ".bin", ".model", ".gguf")


class LoopbackHub:
    """Serves the repositories under a folder.

    Parameters
    ----------
    root : pathlib.Path
        Holds ``org/name`` for each repository.
    wrap : callable, optional
        Makes a TLS socket of the server's.

    Attributes
    ----------
    url : str
        For HF_ENDPOINT.
    asked : list of tuple of str
        ``(method, path, Range header or "")`` of each request so far.
    sent : collections.Counter
        Bytes of content by path.
    faults : dict of str to list
        What happens to the next requests for a path that ends with the key, one each: a status such
        as 500, ``("busy", seconds)``, ``("cut", bytes)``, ``("hold", bytes)``, which goes on once
        ``release`` is set, ``"html"``, or None for nothing. The key ``"*"`` stands for all;
        ``"info"`` for the listing.
    forever : dict of str to object
        The same, each time.
    hidden, wrong : set of str
        Files that the listing has and the Hub has not; files whose content differs from their hash.
    gated : set of str
        Repositories whose files want a token.
    private : set of str
        Repositories that nobody sees without a token.
    expired : set of str
        Tokens that the Hub does not accept, for a public repository either:
        https://github.com/huggingface/huggingface_hub/pull/2847.
    says : dict of str to dict
        What a repository's listing says otherwise: fields of its own, and ``sizes`` by file.
    """

    def __init__(self, root, wrap=None):
        self.root = root
        self.asked = []
        self.sent = Counter()
        self.faults, self.forever = {}, {}
        self.hidden = set()
        self.wrong = set()
        self.gated = set()
        self.private = set()
        self.expired = set()
        self.says = {}
        self.release = threading.Event()
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.server.daemon_threads = True
        scheme = "http"
        if wrap:
            self.server.socket = wrap(self.server.socket)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def close(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo):
        """Return the repository's newest commit: a hash of what is in it, so that it moves with a change."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path in self.files(repo):
            digest.update(path.encode() + (self.root / repo / path).read_bytes())
        return digest.hexdigest()

    def files(self, repo):
        folder = self.root / repo
        return sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )

    def fault(self, path):
        """Return what is to go wrong with this request, and use it up."""
        for key in (path, *[key for key in self.faults if path.endswith(key)], "*"):
            if self.faults.get(key):
                return self.faults[key].pop(0)
        return next(
            (what for key, what in self.forever.items() if path.endswith(key) or key == "*"), None
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each small answer waits 40 ms for an acknowledgement

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        fault = hub.fault("info" if info else path)
        if fault == "html":
            return self.answer(
                b"<!DOCTYPE html><title>Welcome to Hotel WiFi</title>",
                {"Content-Type": "text/html"},
            )
        if isinstance(fault, tuple) and fault[0] == "busy":
            return self.answer(b"", {"Retry-After": str(fault[1])}, 429)
        if isinstance(fault, int):
            return self.answer(b"", {"Retry-After": "0"}, fault)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in hub.expired:
            return self.answer(
                b"", {"X-Error-Message": "Invalid credentials in Authorization header"}, 401
            )
        repo = (info or file or [None, ""])[1]
        if not (hub.root / repo).is_dir() or not repo or (repo in hub.private and not token):
            return self.answer(b"", {"X-Error-Code": "RepoNotFound"}, 401)
        commit = hub.commit(repo)
        revision = (info or file)[2] or "main"
        if revision not in ("main", commit):
            return self.answer(b"", {"X-Error-Code": "RevisionNotFound"}, 404)
        if info:
            return self.answer(
                json.dumps(self.info(repo, commit)).encode(),
                {"Content-Type": "application/json"},
                200,
                fault,
            )
        return self.file(repo, commit, file[3], fault)

    def info(self, repo, commit):
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        says = dict(self.hub.says.get(repo, {}))
        sizes = says.pop("sizes", {})
        siblings = []
        for name in self.hub.files(repo):
            content = (self.hub.root / repo / name).read_bytes()
            sibling = {"rfilename": name}
            if blobs:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
                sibling |= {"size": sizes.get(name, len(content)), "blobId": blob.hexdigest()}
                if name.endswith(LARGE):
                    sibling["lfs"] = {
                        "size": len(content),
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "pointerSize": 130,
                    }
            siblings.append(sibling)
        card = {"license": "mit", "pipeline_tag": "text-generation"}
        more = (
            {"safetensors": {"parameters": {"F32": 147_776}, "total": 147_776}}
            if "onnx" not in repo
            else {}
        )
        return (
            {
                "id": repo,
                "sha": commit,
                "siblings": siblings,
                "cardData": card,
                "tags": [],
                "downloads": 0,
                "pipeline_tag": "text-generation",
                "gated": "manual" if repo in self.hub.gated else False,
                "private": False,
            }
            | more
            | says
        )

    def file(self, repo, commit, name, fault):
        hub, path = self.hub, f"{repo}/{name}"
        if repo in hub.gated and not self.headers.get("Authorization"):
            return self.answer(b"", {"X-Error-Code": "GatedRepo"}, 401)
        if path in hub.hidden or not (hub.root / path).is_file():
            return self.answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)
        content = (hub.root / path).read_bytes()
        if path in hub.wrong:
            content = bytes(len(content))
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return self.answer(content[first:], headers, 206 if first else 200, fault, path)

    def answer(self, content, headers, status=200, fault=None, path=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        kind, amount = fault if isinstance(fault, tuple) else (fault, len(content))
        try:
            self.send(content[:amount], path)
            if kind == "hold":
                self.hub.release.wait()
                self.send(content[amount:], path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if kind == "cut":
            self.close_connection = True

    def send(self, part, path):
        self.wfile.write(part)
        self.wfile.flush()
        if path:
            self.hub.sent[path] += len(part)


def certificate(folder, first, last):
    """Write a certificate for this machine, valid from ``first`` to ``last``, counted from now."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + first)
        .not_valid_after(now + last)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return file

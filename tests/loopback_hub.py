"""A hub of our own on 127.0.0.1: what huggingface_hub uses of the Hugging Face protocol, with faults to order.

It reads what a test adds (bytes, or files that are streamed) and writes nothing. Two ports: the hub, which answers the
API and small files itself, and a "CDN", which is another origin and serves the large ("LFS") files that `resolve`
redirects to. Requests in absolute form are answered too, so the hub's address also works as an HTTP proxy.

    with Hub() as hub:
        commit = hub.add("dataset", "owner/name", {"README.md": b"# hi", "data/train.parquet": Path("big.parquet")})
        cut = hub.fault("cut", match="train.parquet", after=1_000_000)          # once; times=None: always
        run_program("download_01_english_korean", env={"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"})
        assert cut.used == 1 and hub.sent["data/train.parquet"] == size

To try it by hand, with FOLDER/{models,datasets}/<owner>/<name>/ as repositories and FOLDER/static/ as plain files:

    python tests/loopback_hub.py --serve FOLDER --port 0            # prints the address for HF_ENDPOINT
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import os
import re
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cached_property, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

LFS_SUFFIXES = (".parquet", ".safetensors", ".gz", ".zip", ".model")
LFS_SIZE = 1_000_000  # bytes; a larger file is stored as LFS whatever its name is
TEXT_SUFFIXES = (".csv", ".json", ".jsonl", ".md", ".txt")  # what the real hub compresses (see Hub.compress)
BLOCK = 4 * 2**20  # bytes for one sendfile: few enough to notice a rate or an end, large enough not to be felt
SLOW_BLOCK = 16 * 2**10  # bytes for one write while a rate is set, at most; and 20 writes a second at least
SLOW_SEND_BUFFER = 64 * 2**10  # bytes; by default Linux takes megabytes off our hands before a client reads any
BURST = 0.05  # seconds of lateness that a rate makes up for; without it a busy machine never reaches the rate
EXPANDED_PAGE = 50  # entries on a page with ?expand=true, as on the real hub
EPOCH = 1_700_000_000  # seconds; the date of everything here, so that answers do not change from run to run
INVALID_CREDENTIALS = "Invalid credentials in Authorization header"  # huggingface_hub compares with these words


# contents -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)  # a large file is often added to several hubs of one test run
def _sha256_of(path: Path, _size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Blob:
    """The bytes of one file: held in memory, or streamed from a path that must not change while it is served."""

    def __init__(self, content: bytes | Path):
        self.data = None if isinstance(content, Path) else bytes(content)
        self.path = content.absolute() if isinstance(content, Path) else None
        self._stamp = self._stamp_now()
        self.size = self._stamp[0]
        self.changed = self._stamp[1] // 10**9 if self.path else EPOCH  # seconds since 1970

    def _stamp_now(self) -> tuple[int, int]:
        if self.path is None:
            return len(self.data), 0
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.path is None else _sha256_of(self.path, *self._stamp)

    def read(self) -> bytes:
        return self.data if self.path is None else self.path.read_bytes()

    def byte(self, position: int) -> int:
        if self.path is None:
            return self.data[position]
        with open(self.path, "rb") as file:
            file.seek(position)
            return file.read(1)[0]

    @contextmanager
    def sender(self) -> Iterator[Callable[[socket.socket, int, int], int]]:
        """send(connection, start, count) -> how many bytes the system took; files never pass through Python."""
        if self.path is None:
            view = memoryview(self.data)
            yield lambda connection, start, count: connection.send(view[start : start + count])
            return
        if self._stamp_now() != self._stamp:
            raise RuntimeError(f"{self.path} changed after it was added to the hub: the commit is no longer true")
        with open(self.path, "rb") as file:
            yield lambda connection, start, count: os.sendfile(connection.fileno(), file.fileno(), start, count)


@dataclass(frozen=True)
class Stored:
    """A file as a repository holds it: in git, or as LFS with a pointer in git."""

    name: str
    blob: Blob
    lfs: bool

    @cached_property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.blob.sha256}\nsize {self.blob.size}\n"
        ).encode()

    @cached_property
    def oid(self) -> str:
        """The git id: of the pointer for an LFS file, of the content for others."""
        return _git_oid(self.pointer if self.lfs else self.blob.read())


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict[str, Stored]

    @cached_property
    def folders(self) -> dict[str, str]:
        """Every folder and an id of what is in it."""
        inside: dict[str, list[str]] = {}
        for name, file in sorted(self.files.items()):
            parts = name.split("/")
            for depth in range(1, len(parts)):
                inside.setdefault("/".join(parts[:depth]), []).append(f"{name}:{file.oid}")
        return {folder: hashlib.sha1("\n".join(lines).encode()).hexdigest() for folder, lines in inside.items()}


@dataclass
class Repository:
    kind: str  # "model" or "dataset"
    id: str  # "owner/name"
    gated: bool | str = False
    main: str = ""
    commits: dict[str, Commit] = field(default_factory=dict)


# faults -------------------------------------------------------------------------------------------------

_FAULT_OPTIONS = {
    "status": {"code", "retry_after", "ratelimit", "error_code", "message"},
    "cut": {"after", "reset"},
    "delay": {"seconds"},
    "stall": {"after", "seconds"},
    "short": {"missing"},
    "altered": {"at"},
    "no_range": set(),
}
_PLACES = ("api", "resolve", "cdn", "static")


@dataclass
class Fault:
    """What goes wrong, where and how often. `used` counts how often it did.

    status    answer `code` (503) instead; with Retry-After: `retry_after` seconds, or the RateLimit headers of the
              real hub's 429 (`ratelimit` seconds to wait), or X-Error-Code `error_code` and `message`
    cut       after `after` (0) bytes of the body, close the connection; reset=True: with a TCP reset, which also loses
              what the client has not got yet
    delay     wait `seconds` before answering
    stall     after `after` bytes of the body, send nothing for `seconds`, then close the connection
    short     a complete answer for a file without its last `missing` bytes (half of it): a truncated copy
    altered   the byte at offset `at` of the file (the middle of what is sent) is another one
    no_range  the Range header is ignored: 200 and the whole file

    Body faults wait for an answer that they fit: not HEAD, not a redirect, not a body that is over before `after`.
    """

    kind: str
    match: str = ""  # part of the path, which holds the file name on the CDN too; "" is every request
    times: int | None = 1  # None: always
    where: str | None = None  # one of _PLACES; None: everywhere
    method: str | None = None  # "HEAD", "GET" or "POST"; None: all of them
    code: int = 503
    retry_after: int | str | None = None
    ratelimit: int | None = None
    error_code: str | None = None
    message: str = "a fault that a test ordered"
    after: int = 0
    seconds: float = 0.0
    missing: int | None = None
    at: int | None = None
    reset: bool = False
    used: int = 0

    def place_of_change(self, start: int, stop: int) -> int:
        return (start + stop) // 2 if self.at is None else self.at


# the hub ------------------------------------------------------------------------------------------------


class Hub:
    """The server, what it serves and what it saw. Start it with `with`; add and fault at any time.

    Everything that was asked for is in `requests` (method, path, range, status, where, and whether a token came along,
    never the token). `sent` counts the body bytes of files by name inside the repository (a static file by its path),
    as the system takes them: exact for what a client received to the end; for a client that was killed it may be ahead
    by what was in the socket buffers, little (about 64 KiB here plus the client's side) when a rate is set.
    """

    def __init__(self, *, port: int = 0, page_size: int = 1000, rate: float | None = None):
        self.port = port
        self.page_size = page_size  # entries on a page of a tree
        self.rate = rate  # bytes of file a second over all connections; None: no limit
        self.compress = False  # gzip small text files for clients that accept it, as the real hub does
        self.tokens: dict[str, set[str]] = {}  # valid tokens: the gated repositories that each has access to
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []  # bugs of this file; raised on exit
        self.cdn_saw_authorization = False
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._static: dict[str, Blob] = {}
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the line is free again at the current rate, on the monotonic clock
        self._closing = threading.Event()
        self.reset_counts()

    def __enter__(self) -> Hub:
        self._servers = [_Server(self, self.port), _Server(self, 0)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._closing.set()
        for server in self._servers:
            server.stop()
        if self.errors and error is None:  # a test that failed already says more than what it did to us
            raise RuntimeError(f"{len(self.errors)} error(s) inside the loopback hub, the first:") from self.errors[0]

    def add(self, kind: str, repo_id: str, files: dict[str, bytes | Path], *, gated: bool | str = False) -> str:
        """A new commit of a repository with exactly these files; `main` points to it. Returns its sha (40 hex).

        The sha follows from the repository and its contents, so adding the same again is the same commit.
        """
        if kind not in ("model", "dataset") or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
            raise ValueError(f"not a repository: {kind} {repo_id}")
        stored = {name: self._store(name, content) for name, content in files.items()}
        lines = [f"{kind} {repo_id}", *(f"{name} {file.oid}" for name, file in sorted(stored.items()))]
        commit = Commit(hashlib.sha1("\n".join(lines).encode()).hexdigest(), stored)
        with self._lock:
            repository = self._repositories.get((kind, repo_id)) or Repository(kind, repo_id)
            repository.commits[commit.sha] = commit
            repository.main, repository.gated = commit.sha, gated
            self._repositories[kind, repo_id] = repository  # last: requests are answered meanwhile
        return commit.sha

    @staticmethod
    def _store(name: str, content: bytes | Path) -> Stored:
        blob = Blob(content)
        return Stored(name, blob, lfs=name.endswith(LFS_SUFFIXES) or blob.size > LFS_SIZE)

    def add_folder(self, folder: Path) -> list[str]:
        """Serve FOLDER/{models,datasets}/<owner>/<name>/ as repositories and FOLDER/static/ as plain files."""
        added = []
        for kind in ("model", "dataset"):
            for home in sorted((folder / f"{kind}s").glob("*/*")):
                files = {f.relative_to(home).as_posix(): f for f in sorted(home.rglob("*")) if f.is_file()}
                files = {name: f for name, f in files.items() if not name.startswith((".git/", ".cache/"))}
                self.add(kind, f"{home.parent.name}/{home.name}", files)
                added.append(f"{kind} {home.parent.name}/{home.name}")
        for file in (f for f in sorted((folder / "static").rglob("*")) if f.is_file()):
            self.serve(f"/{file.relative_to(folder / 'static').as_posix()}", file)
            added.append(f"/{file.relative_to(folder / 'static').as_posix()}")
        return added

    def serve(self, path: str, content: bytes | Path) -> None:
        """A plain file outside any repository, open to everyone. Serving a path again replaces what was there."""
        self._static[path] = Blob(content)

    def fault(self, kind: str, match: str = "", times: int | None = 1, **options) -> Fault:
        """Order a fault (see Fault). Of two that fit one request, the one ordered first is used up first."""
        unknown = options.keys() - _FAULT_OPTIONS.get(kind, set()) - {"where", "method"}
        if kind not in _FAULT_OPTIONS or unknown:
            raise ValueError(f"no such fault: {kind} {sorted(unknown)}")
        if options.get("where") not in (None, *_PLACES):
            raise ValueError(f"where is one of {_PLACES}, not {options['where']}")
        self.faults.append(Fault(kind, match, times, **options))
        return self.faults[-1]

    def clear_faults(self) -> None:
        self.faults = []

    def reset_counts(self) -> None:
        """Forget what was asked for and sent so far (not cdn_saw_authorization: once is too often)."""
        with self._lock:
            self.sent: Counter[str] = Counter()
            self.requests: list[dict] = []
            self.proxied = 0  # requests that came in absolute form, as to a proxy

    @property
    def sent_total(self) -> int:
        with self._lock:
            return sum(self.sent.values())

    # for the handler

    def _take_fault(self, kind: str, request: _Handler, fits: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if (
                    fault.kind == kind
                    and fault.match in request.text
                    and fault.where in (None, request.where)
                    and fault.method in (None, request.command)
                    and (fault.times is None or fault.used < fault.times)
                    and fits(fault)
                ):
                    fault.used += 1
                    return fault
        return None

    def _count(self, counter: Counter[str], name: str, count: int) -> None:
        with self._lock:
            counter[name] += count

    def _wait_for_turn(self, wanted: int) -> int:
        """How many bytes may go out next, after waiting until they may."""
        if (rate := self.rate) is None:
            return min(wanted, BLOCK)
        size = min(wanted, SLOW_BLOCK, max(1, int(rate * BURST)))
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - BURST) + size / rate
            wait = self._free_at - now
        if wait > 0:
            self._closing.wait(wait)
        return size


class _Server(ThreadingHTTPServer):
    """One of the hub's two ports. It knows its open connections, to end them when the hub closes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, port: int):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look our name up in the DNS
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        error = sys.exc_info()[1]
        gone = isinstance(error, ConnectionError) or (isinstance(error, OSError) and self.hub._closing.is_set())
        if not gone:  # a client may leave whenever it likes
            self.hub.errors.append(error)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that is sending or waiting
            except OSError:
                pass  # closed already


class _Refused(Exception):
    """An answer of 400 or above."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, object] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    """One connection. `_answer` is the table of contents; what refuses raises _Refused."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; with Nagle the second waits 40 ms for an ACK
    server: _Server

    def _answer(self) -> None:
        self.hub = self.server.hub
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))  # or the next request starts here
        self._read_target()
        try:
            self._fail_if_ordered()
            self._route()
        except _Refused as refused:
            self._refuse(refused)

    do_GET = do_HEAD = do_POST = _answer

    def _read_target(self) -> None:
        url = urlsplit(self.path)
        port, host = self.server.server_port, self.headers.get("Host")
        if url.scheme:  # absolute form: we are the proxy, for our own two ports and for made-up hosts
            port, host = url.port, url.netloc
            with self.hub._lock:
                self.hub.proxied += 1
        self.origin = f"http://{host}"  # what the client calls us, for links that it can follow
        self.quoted_path, self.query = url.path, url.query
        self.text = unquote(url.path) + (f"?{url.query}" if url.query else "")
        if port == self.hub._servers[1].server_port:
            self.where = "cdn"
            self.hub.cdn_saw_authorization |= "Authorization" in self.headers
        elif unquote(url.path) in self.hub._static:
            self.where = "static"
        else:
            self.where = "api" if url.path.startswith("/api/") else "resolve"

    def _fault(self, kind: str, fits: Callable[[Fault], bool] = lambda fault: True) -> Fault | None:
        return self.hub._take_fault(kind, self, fits)

    def _fail_if_ordered(self) -> None:
        if delay := self._fault("delay"):
            self._pause(delay.seconds)
        if status := self._fault("status"):
            headers = {"Retry-After": status.retry_after}
            if status.ratelimit is not None:
                headers["RateLimit"] = f'"api";r=0;t={status.ratelimit}'
                headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
            raise _Refused(status.code, status.error_code, status.message, headers)

    def _pause(self, seconds: float) -> None:
        """Wait, but not for a client that has gone (or a hub that closes): its side of the connection is at an end."""
        if select.select([self.connection], [], [], seconds)[0]:
            raise ConnectionAbortedError("the client did not wait")

    def _route(self) -> None:
        if self.where == "static":
            return self._static()
        if self.where != "cdn":
            self._accepted()  # a wrong token is refused even where none is needed, as on the real hub
        for pattern, action in _CDN_ROUTES if self.where == "cdn" else _ROUTES:
            if (found := pattern.fullmatch(self.quoted_path)) and (self.command == "POST") == (
                action is _Handler._paths_info
            ):
                return action(self, **{k: None if v is None else unquote(v) for k, v in found.groupdict().items()})
        raise _Refused(404, None, "Sorry, we can't find the page you are looking for.")

    # who may what

    def _accepted(self) -> set[str] | None:
        """The gated repositories that the token of this request has access to; None without a token."""
        if (header := self.headers.get("Authorization")) is None:
            return None
        accepted = self.hub.tokens.get(header.removeprefix("Bearer "))
        if accepted is None:
            raise _Refused(401, None, INVALID_CREDENTIALS)
        return accepted

    def _repository(self, kind: str | None, repo_id: str) -> Repository:
        repository = self.hub._repositories.get((kind or "model", repo_id))
        if repository is None and self._accepted() is None:
            # The real API sends this one without a code, and huggingface_hub knows it by its https:// address alone.
            raise _Refused(401, "RepoNotFound", "Invalid username or password.")
        if repository is None:
            raise _Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def _require_access(self, repository: Repository) -> None:
        if not repository.gated:
            return
        accepted, what = self._accepted(), f"Access to {repository.kind} {repository.id} is restricted"
        if accepted is None:
            message = f"{what}. You must have access to it and be authenticated to access it. Please log in."
            raise _Refused(401, "GatedRepo", message)
        if repository.id not in accepted:
            message = f"{what} and you are not in the authorized list. Visit {self.origin} to ask for access."
            raise _Refused(403, "GatedRepo", message)

    @staticmethod
    def _commit(repository: Repository, revision: str | None) -> Commit:
        sha = repository.main if revision in (None, "main") else revision
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.commits[sha]

    # the API

    def _whoami(self) -> None:
        if self._accepted() is None:
            raise _Refused(401, None, "Invalid username or password.")
        self._send_json({"type": "user", "name": "tester", "auth": {"type": "access_token"}, "orgs": []})

    def _auth_check(self, kind: str, repo_id: str) -> None:
        self._require_access(self._repository(kind, repo_id))
        self._send_json({})

    def _info(self, kind: str, repo_id: str, revision: str | None) -> None:
        repository = self._repository(kind, repo_id)
        commit = self._commit(repository, revision)
        query = parse_qs(self.query)
        known = {
            "sha": commit.sha,
            "author": repo_id.split("/")[0],
            "lastModified": _iso_date(),
            "createdAt": _iso_date(),
            "private": False,
            "gated": repository.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "usedStorage": sum(file.blob.size for file in commit.files.values()),
            "siblings": [_sibling(file, "blobs" in query) for _, file in sorted(commit.files.items())],
        }
        wanted = query.get("expand") or known
        self._send_json({"_id": commit.sha[:24], "id": repo_id, **{k: v for k, v in known.items() if k in wanted}})

    def _tree(self, kind: str, repo_id: str, revision: str, path: str | None) -> None:
        commit = self._commit(self._repository(kind, repo_id), revision)
        if path and path not in commit.folders:
            raise _Refused(404, "EntryNotFound", f'{path} does not exist on "{revision}"')
        query = dict(parse_qsl(self.query))
        recursive, expand = (query.get(option, "").lower() == "true" for option in ("recursive", "expand"))
        prefix = f"{path}/" if path else ""
        entries = [
            entry
            for name, entry in sorted(_entries(commit, expand).items())
            if name.startswith(prefix) and (recursive or "/" not in name[len(prefix) :])
        ]
        page = min(self.hub.page_size, EXPANDED_PAGE if expand else self.hub.page_size)
        start = int(base64.urlsafe_b64decode(query["cursor"])) if "cursor" in query else 0
        headers = {}
        if start + page < len(entries):
            query["cursor"] = base64.urlsafe_b64encode(str(start + page).encode()).decode()
            headers["Link"] = f'<{self.origin}{self.quoted_path}?{urlencode(query)}>; rel="next"'
        self._send_json(entries[start : start + page], headers)

    def _paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        commit = self._commit(self._repository(kind, repo_id), revision)
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(self.content)
            paths, expand = asked["paths"], asked.get("expand", False)
        else:
            asked = parse_qs(self.content.decode())
            paths, expand = asked.get("paths", []), asked.get("expand") == ["true"]
        entries = _entries(commit, expand)
        self._send_json([entries[path] for path in paths if path in entries])  # others are left out without a word

    # files

    def _resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(kind, repo_id)
        self._require_access(repository)
        commit = self._commit(repository, revision)
        headers: dict[str, object] = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            raise _Refused(404, "EntryNotFound", "Entry not found", headers)
        headers["Accept-Ranges"] = "bytes"
        if file.lfs:
            location = f"{self.hub.cdn_url}/repos/{repository.kind}s/{repo_id}/{file.blob.sha256}/{quote(path)}"
            headers["Location"] = f"{location}?X-Amz-Expires=3600&X-Amz-Signature={commit.sha}"
            headers |= {"X-Linked-Etag": f'"{file.blob.sha256}"', "X-Linked-Size": file.blob.size}
            # The real redirect has a body too, so its Content-Length is not the size of the file.
            return self._send_plain(302, headers, b"Found. Redirecting to the storage.")
        headers |= {"ETag": f'"{file.oid}"', **_disposition(path)}
        blob = file.blob
        if self.hub.compress and path.endswith(TEXT_SUFFIXES) and "gzip" in self.headers.get("Accept-Encoding", ""):
            blob = Blob(gzip.compress(blob.read(), mtime=0))
            headers |= {"ETag": f'W/"{file.oid}"', "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        self._send_content(blob, headers, name=path, ranges=blob is file.blob)

    def _cdn_file(self, kind: str, repo_id: str, sha256: str, path: str) -> None:
        repository = self.hub._repositories.get((kind, repo_id))
        for commit in list(repository.commits.values()) if repository else []:
            if (file := commit.files.get(path)) and file.lfs and file.blob.sha256 == sha256:
                # The storage has ETags of its own: not the sha256, which only X-Linked-Etag tells.
                headers = {"ETag": f'"{sha256[:32]}"', "Last-Modified": formatdate(EPOCH, usegmt=True)}
                return self._send_content(file.blob, headers | _disposition(path), name=path)
        raise _Refused(403, None, "Access denied")

    def _static(self) -> None:
        path = unquote(self.quoted_path)
        blob = self.hub._static[path]
        headers = {"ETag": f'"{blob.sha256[:32]}"', "Last-Modified": formatdate(blob.changed, usegmt=True)}
        self._send_content(blob, headers, name=path)

    # answers

    def _begin(self, status: int, headers: dict[str, object]) -> None:
        entry = {"method": self.command, "path": self.text, "range": self.headers.get("Range"), "status": status}
        self.hub.requests.append(entry | {"where": self.where, "authorized": "Authorization" in self.headers})
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value).encode("ascii", "backslashreplace").decode())
        self.end_headers()

    def _send_plain(self, status: int, headers: dict[str, object], body: bytes) -> None:
        self._begin(status, {**headers, "Content-Type": "text/plain", "Content-Length": len(body)})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, refused: _Refused) -> None:
        body = json.dumps({"error": refused.message}).encode()
        self._begin(
            refused.status, {**refused.headers, "Content-Type": "application/json", "Content-Length": len(body)}
        )
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: object, headers: dict[str, object] | None = None) -> None:
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        self._send_content(Blob(json.dumps(value).encode()), headers, ranges=False)

    def _send_content(self, blob: Blob, headers: dict[str, object], *, name: str | None = None, ranges: bool = True):
        """Send a body, or the part of it that was asked for, with the faults that were ordered for it."""
        size, head = blob.size, self.command == "HEAD"
        if not head and (short := self._fault("short", lambda fault: (fault.missing or 1) <= blob.size)):
            size -= short.missing or max(1, size // 2)
        status, start, stop = 200, 0, size
        if ranges and (asked := self._asked_range(size, headers)) and (head or not self._fault("no_range")):
            status, (start, stop) = 206, asked
            if start >= stop:
                raise _Refused(416, None, "The range is not satisfiable", {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if ranges:
            headers["Accept-Ranges"] = "bytes"
        cut = stall = altered = None
        if not head:
            cut = self._fault("cut", lambda fault: fault.after < stop - start)
            stall = self._fault("stall", lambda fault: fault.after < stop - start)
            altered = self._fault("altered", lambda fault: start <= fault.place_of_change(start, stop) < stop)
        self._begin(status, {"Content-Type": "application/octet-stream", **headers, "Content-Length": stop - start})
        if head:
            return
        end = min([stop, *(start + fault.after for fault in (cut, stall) if fault)])
        changed = altered.place_of_change(start, stop) if altered else end
        with blob.sender() as send:
            self._send_span(send, start, min(changed, end), name)
            if changed < end:
                other = bytes([blob.byte(changed) ^ 0xFF])
                self._send_span(lambda connection, *_: connection.send(other), changed, changed + 1, name)
                self._send_span(send, changed + 1, end, name)
        if stall and end == start + stall.after:
            self._pause(stall.seconds)
        if end < stop:
            self._hang_up(reset=cut is not None and cut.reset)

    def _asked_range(self, size: int, headers: dict[str, object]) -> tuple[int, int] | None:
        """(start, stop) of the Range header, empty when it is beyond the end; None to answer with everything."""
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").replace(" ", ""))
        condition = self.headers.get("If-Range")
        if not found or not any(found.groups()):  # no range, or several: a server may ignore those
            return None
        if condition and condition not in (headers.get("ETag"), headers.get("Last-Modified")):
            return None
        first, last = found.groups()
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(size, int(last) + 1) if last else size

    def _send_span(self, send: Callable[[socket.socket, int, int], int], start: int, stop: int, name: str | None):
        counter = self.hub.sent  # a reset replaces it; what went out before stays with the old one
        while start < stop:
            count = self.hub._wait_for_turn(stop - start) if name else stop - start
            if self.hub.rate is not None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SLOW_SEND_BUFFER)
            done = 0
            if name:  # counted first and corrected afterwards: whoever has the bytes finds them counted
                self.hub._count(counter, name, count)
            try:
                done = send(self.connection, start, count)
            finally:
                if name and done != count:
                    self.hub._count(counter, name, done - count)
            if not done:
                raise RuntimeError(f"{name} became shorter while it was served")
            start += done

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # a plain close would say FIN before RST, and the client see an end

    def log_message(self, *_) -> None:
        """Silent: what happened is in Hub.requests."""


def _disposition(path: str) -> dict[str, object]:
    name = quote(path.rsplit("/", 1)[-1])
    return {"Content-Disposition": f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"}


def _iso_date() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(EPOCH))


def _sibling(file: Stored, with_blobs: bool) -> dict:
    """A file as repo info shows it."""
    sibling: dict = {"rfilename": file.name}
    if with_blobs:
        sibling |= {"blobId": file.oid, "size": file.blob.size}
        if file.lfs:
            sibling["lfs"] = {
                "sha256": file.blob.sha256,
                "size": file.blob.size,
                "pointerSize": len(file.pointer),
            }
    return sibling


def _entries(commit: Commit, expand: bool) -> dict[str, dict]:
    """Every file and folder of a commit as tree and paths-info show them."""
    entries: dict[str, dict] = {
        folder: {"type": "directory", "oid": oid, "size": 0, "path": folder} for folder, oid in commit.folders.items()
    }
    for name, file in commit.files.items():
        entries[name] = {"type": "file", "oid": file.oid, "size": file.blob.size, "path": name}
        if file.lfs:
            lfs = {"oid": file.blob.sha256, "size": file.blob.size, "pointerSize": len(file.pointer)}
            entries[name]["lfs"] = lfs
        if expand:
            entries[name]["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    if expand:
        for entry in entries.values():
            entry["lastCommit"] = {"id": commit.sha, "title": "Upload files", "date": _iso_date()}
    return entries


_API = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    (re.compile(pattern), action)
    for pattern, action in (
        (r"/api/whoami-v2", _Handler._whoami),
        (rf"{_API}(?:/revision/(?P<revision>[^/]+))?", _Handler._info),
        (rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler._tree),
        (rf"{_API}/paths-info/(?P<revision>[^/]+)", _Handler._paths_info),
        (rf"{_API}/auth-check", _Handler._auth_check),
        (
            r"/(?:(?P<kind>dataset)s/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            _Handler._resolve,
        ),
    )
]
_CDN_ROUTES = [
    (
        re.compile(r"/repos/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)"),
        _Handler._cdn_file,
    )
]


# by hand ------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--rate", type=float, help="bytes a second, over all connections")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    hub = Hub(port=args.port, rate=args.rate)
    added = hub.add_folder(args.serve)
    if not added:
        print(f"{args.serve}: no models/<owner>/<name>, datasets/<owner>/<name> or static in it", file=sys.stderr)
        return 2
    with hub:
        print(hub.url, flush=True)
        print(*(f"  {name}" for name in added), sep="\n", file=sys.stderr)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())

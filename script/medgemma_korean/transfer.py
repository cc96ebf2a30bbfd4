"""Bytes from the network into files: continued where they broke off, verified, tried again, with progress.

A file grows as `.<name>.<hash>.part` beside its place and takes its name only when its size and its hash are the
announced ones. The bytes come through huggingface_hub's `http_get`, which its own downloads use too; those begin
anew in a new process, ours continue.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import records
from medgemma_korean.cli import Every, count, log, size_text
from medgemma_korean.progress import duration

WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further attempt; an attempt that brought bytes starts anew
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that another attempt may better
ATTEMPTS_AT_CONTENT = 3  # fetches of a file whose bytes are not what was announced
# Bytes handed on at a time: a killed process loses at most this much of a file. Of 64 KiB to 2 MiB, 128 and 256 KiB
# were fastest, and 1 MiB took a fifth to three quarters longer (tests/bench/README.md).
BLOCK = 1 << 18


@dataclass(frozen=True)
class File:
    """One file to fetch. sha256 or git (the sha1 of a git blob) is what the hub announced; both may be unknown."""

    name: str
    size: int
    url: str
    headers: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    git: str = ""

    def part(self, folder: Path) -> Path:
        """Where it grows. Another content has another name, so that bytes of two revisions never meet."""
        place, unhashed = folder / self.name, f"{self.size} {self.headers.get('If-Range', '')}"
        content = self.sha256 or self.git or hashlib.sha256(unhashed.encode()).hexdigest()
        return place.with_name(f".{place.name}.{content[:16]}.part")


Add = Callable[[int, bool], None]


class Altered(Exception):
    """The bytes are not those that were announced."""


class Stopped(Exception):
    """Another file failed, or the program was asked to end."""


def transient(error: BaseException) -> bool:
    """True for what another attempt may better: lost connections, time-outs, a server in trouble."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):  # a ConnectionError by its class
        return False
    if (response := getattr(error, "response", None)) is not None:
        # 403 behind a redirect is a signed address that has grown too old; the next attempt gets another.
        return response.status_code in TRANSIENT or (response.status_code == 403 and bool(response.history))
    if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore")):
        return True
    if isinstance(error, RecursionError):  # http_get calls itself once for every lost connection that had brought bytes
        return True
    # http_get raises a bare OSError when a connection ended cleanly before its time.
    return isinstance(error, (ConnectionError, TimeoutError)) or (type(error) is OSError and error.errno is None)


def reason(error: BaseException) -> str:
    """An error in a few words, without addresses (those of a download carry signatures)."""
    if (response := getattr(error, "response", None)) is not None:
        return f"HTTP {response.status_code}"
    if type(error) is OSError and error.errno is None:
        return "the connection ended early"
    return type(error).__name__


def asked_wait(error: BaseException) -> float:
    """Seconds that the server asked to wait, 0 where it did not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "")
    if used_up := re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", "")):  # as the hub says it
        value = used_up[1]
    return min(float(value), 3600.0) if value.isdigit() else 0.0


def patiently(call: Callable[[], Any], what: str) -> Any:
    """`call()`, tried again three times after transient errors; the last error is raised."""
    for wait in (*WAITS[:3], None):
        try:
            return call()
        except Exception as error:
            if wait is None or not transient(error):
                raise
            wait = max(wait, asked_wait(error))
            log.info("%s: %s; trying again in %s", what, reason(error), duration(wait))
            time.sleep(wait)


# one file -----------------------------------------------------------------------------------------------


class PartFile:
    """The growing file, as `http_get` wants it, with its hashes kept up to date."""

    def __init__(self, path: Path, file: File, add: Add) -> None:
        self.path, self.expected, self._add = path, file, add
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()  # no part of ours: what it points to is not to be written
        # Unbuffered: what a full disk did not take must not be tried again by close(), which would raise in its place.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
        self.size = 0
        self._begin()
        if self._file.tell() > file.size:
            self._file.truncate(0)
        with open(path, "rb") as there:
            while block := there.read(BLOCK):
                self._count(block, fetched=False)

    def _begin(self) -> None:
        self._add(-self.size, False)
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % self.expected.size) if self.expected.git else None

    def _count(self, block: bytes, fetched: bool) -> None:
        self._sha256.update(block)
        if self._git:
            self._git.update(block)
        self.size += len(block)
        self._add(len(block), fetched)

    def write(self, block: bytes) -> int:
        if self.size + len(block) > self.expected.size:
            raise Altered(f"more than the announced {self.expected.size:,} bytes")
        left = memoryview(block)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            error.filename = str(self.path)
            raise
        self._count(block, fetched=True)
        return len(block)

    def tell(self) -> int:
        return self.size

    def seek(self, position: int) -> int:
        """A server that ignores ranges sends the whole file again: `http_get` goes back to the start."""
        assert position == 0, position
        return 0

    def truncate(self) -> None:
        self._file.truncate(0)
        self._begin()

    def verify(self) -> str:
        """The sha256. Raises Altered when size or hash differ from what was announced."""
        if self.size != self.expected.size:
            raise Altered(f"{self.size:,} bytes instead of {self.expected.size:,}")
        sha256 = self._sha256.hexdigest()
        if self.expected.sha256 and sha256 != self.expected.sha256:
            raise Altered(f"sha256 {sha256[:12]}… instead of {self.expected.sha256[:12]}…")
        if self._git and self._git.hexdigest() != self.expected.git:
            raise Altered(f"git hash {self._git.hexdigest()[:12]}… instead of {self.expected.git[:12]}…")
        os.fsync(self._file.fileno())
        return sha256

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def fetch_file(file: File, folder: Path, add: Add, pause: Callable[[str, float], None]) -> str:
    """Fetch one file to its place below `folder`, continuing a part that is there; returns its sha256.

    add(bytes, fetched): told how many are there, from the network or from before (less than none, when they were no
    good). pause(why, seconds): says so and waits.
    Raises Altered when the content is wrong again and again, or the last transient error.
    """
    part = file.part(folder)
    for attempt in range(1, ATTEMPTS_AT_CONTENT + 1):
        try:
            with PartFile(part, file, add) as growing:
                _stream(file, growing, pause)
                sha256 = growing.verify()
        except Altered as error:
            add(-growing.size, False)
            part.unlink()
            if attempt == ATTEMPTS_AT_CONTENT:
                raise
            pause(f"{file.name} is not what was announced ({error}); fetching it again", WAITS[attempt - 1])
        else:
            place = folder / file.name
            os.replace(part, place)
            records.remember_sha256(place, sha256)
            return sha256
    raise AssertionError("unreachable")


def _stream(file: File, growing: PartFile, pause: Callable[[str, float], None]) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    constants.DOWNLOAD_CHUNK_SIZE = BLOCK  # 10 MB otherwise, all of it lost by a kill
    failures = 0
    while True:
        before = growing.size
        try:
            # Its own retries recurse and keep every broken response open: as few as it lets us, the loop is here.
            http_get(
                file.url,
                growing,
                resume_size=before,
                headers=file.headers,
                expected_size=file.size,
                displayed_filename=file.name,
                _nb_retries=0,
            )
            return
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            # A whole answer that is too short is of another file: If-Range would have brought what is missing.
            ended = type(error) is OSError and error.errno is None and growing.size <= before
            if status == 416 or ended:
                raise Altered("the server's file is shorter than announced") from None
            if not transient(error) or (status == 429 and asked_wait(error)):  # http_get waited for it five times
                raise
            failures = 1 if growing.size > before else failures + 1
            if failures > len(WAITS):
                raise
            wait = max(WAITS[failures - 1], asked_wait(error))
            pause(f"{file.name}: {reason(error)} at {size_text(growing.size)}; trying again", wait)


# many files ---------------------------------------------------------------------------------------------


class Transfer:
    """Files on several connections at once. Workers fetch; the calling thread shows how it goes."""

    def __init__(self, label: str, files: list[File], folder: Path, here: int, connections: int) -> None:
        """here: bytes of the source that need no fetching."""
        self.label, self.folder, self.here = label, folder, here
        self.total = here + sum(f.size for f in files)
        self.done: dict[str, int] = {}  # bytes there, by file begun
        self._fetched: list[int] = []  # appended to by several threads, which `+=` on a number does not survive
        self.sha256: dict[str, str] = {}
        self._sizes = {f.name: f.size for f in files}
        self._todo: queue.SimpleQueue[File] = queue.SimpleQueue()
        for file in files:
            self._todo.put(file)
        self._events: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._connections = min(connections, len(files))
        self._started = time.monotonic()

    def run(self, tick: Callable[[int, int, str], None]) -> dict[str, str]:
        """Fetch all; returns sha256 by name. tick(bytes, of, text) is called about once a second.

        Raises what the first failing file raised, with `.file` set to its name; what has come is kept.
        """
        # Daemons: a worker that waits for a dead server must not hold up the end of the program.
        for _ in range(self._connections):
            threading.Thread(target=self._work, name="transfer", daemon=True).start()
        second, minute = Every(1.0), Every(60.0)
        try:
            with quiet_library(), _Bars(self) as bars:
                while len(self.sha256) < len(self._sizes):
                    with contextlib.suppress(queue.Empty):
                        kind, name, value = self._events.get(timeout=0.2)
                        if kind == "failed":
                            value.file = name
                            raise value
                        if kind == "said":
                            bars.say(f"{self.label}: {value}")
                        else:
                            self.sha256[name] = value
                    bars.draw()
                    if second():
                        tick(self.there, self.total, self.state())
                    if minute():
                        bars.say(f"{self.label}: {self.state()}")
        finally:
            self._stop.set()
        return self.sha256

    @property
    def fetched(self) -> int:
        """Bytes that came over the network."""
        return sum(self._fetched)

    @property
    def there(self) -> int:
        return self.here + sum(self.done.values())

    @property
    def active(self) -> list[tuple[str, int, int]]:
        """(name, bytes, of) of the files that are being fetched."""
        return [(n, b, self._sizes[n]) for n, b in list(self.done.items()) if n not in self.sha256]

    def state(self) -> str:
        """`1.2 of 2.8 GB, 31 MB/s, 51 s left`"""
        rate = self.fetched / max(time.monotonic() - self._started, 1e-3)
        left = f", {duration((self.total - self.there) / rate)} left" if rate > 0 else ""
        return f"{size_text(self.there)} of {size_text(self.total)}, {size_text(rate)}/s{left}"

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                file = self._todo.get_nowait()
            except queue.Empty:
                return
            self.done[file.name] = 0
            try:
                digest = fetch_file(file, self.folder, lambda n, new, f=file: self._add(f.name, n, new), self._pause)
                self._events.put(("done", file.name, digest))
            except Stopped:
                return
            except BaseException as error:  # handed to the calling thread, which raises it
                self._events.put(("failed", file.name, error))
                return

    def _add(self, name: str, number: int, fetched: bool) -> None:
        if self._stop.is_set():
            raise Stopped
        self.done[name] += number
        if fetched:
            self._fetched.append(number)

    def _pause(self, message: str, seconds: float) -> None:
        self._events.put(("said", None, f"{message} in {duration(seconds)}"))
        if self._stop.wait(seconds):
            raise Stopped


class _Bars:
    """A bar for the whole and one for each file under way, in a terminal; nothing elsewhere."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer, self.bars = transfer, {}
        self.shown = sys.stderr.isatty()

    def __enter__(self) -> _Bars:
        return self

    def draw(self) -> None:
        if not self.shown:
            return
        t = self.transfer
        rows = [(t.label, t.there, t.total), *(t.active if len(t._sizes) > 1 else [])]
        for name in set(self.bars) - {row[0] for row in rows}:
            self.bars.pop(name).close()
        for name, there, total in rows:
            if name not in self.bars:
                self.bars[name] = self._bar(name, there, total)
            self.bars[name].n = there
            self.bars[name].refresh()

    @staticmethod
    def _bar(name: str, there: int, total: int) -> Any:
        from tqdm import tqdm

        short = name if len(name) <= 36 else f"…{name[-35:]}"
        return tqdm(desc=short, total=total, initial=there, unit="B", unit_scale=True, leave=False, mininterval=0.2)

    def say(self, message: str) -> None:
        """A log line, above the bars."""
        for bar in self.bars.values():
            bar.clear()
        log.info("%s", message)

    def __exit__(self, *_: object) -> None:
        for bar in self.bars.values():
            bar.close()


class _Waits(logging.Handler):
    """Passes on what the library says about waiting, and nothing else: its other lines hold addresses."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Rate limited"):
            log.info("the hub asks to wait: %s", message)
        elif message.startswith("Retrying in"):
            log.info("no good answer from the hub: %s", message)


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Nothing of what the library says reaches the terminal, except that it waits."""
    logger = logging.getLogger("huggingface_hub")
    handler, before = _Waits(), (list(logger.handlers), logger.propagate)
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


def finished(label: str, files: int, size: int, seconds: float) -> None:
    """The line that ends a source."""
    rate = f", {size_text(size / seconds)}/s" if seconds > 1 else ""
    log.info("%s: %s, %s in %s%s", label, count(files, "file"), size_text(size), duration(seconds), rate)

"""Shared fixtures: a project root of its own for every test, the shipped programs run as a user does, a hub."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# As the programs do (cli.start_logging), for what torch computes in this process: set before it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # two tests run at once

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_RAW = REPOSITORY / "data" / "sample" / "01_raw"


LONGEST = ("test_end_to_end.py", "test_chaos.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, one to each of two processes."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@dataclass(frozen=True)
class Outcome:
    """What a program answered."""

    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr


def program_file(name: str) -> Path:
    """script/*/<name>.py"""
    (file,) = (f for f in (REPOSITORY / "script").glob(f"*/{name}.py") if f.parent.name != "medgemma_korean")
    return file


def copy_sample(root: Path) -> Path:
    """A project root with the sample's raw data and nothing else."""
    shutil.copytree(SAMPLE_RAW, root / "data" / "sample" / "01_raw", ignore=shutil.ignore_patterns(".*"))
    return root


def _run(name: str, *args: object, root: Path, env: dict[str, str] | None = None, timeout: float = 600) -> Outcome:
    environment = {**os.environ, "MEDGEMMA_KOREAN_ROOT": str(root), **(env or {})}
    done = subprocess.run(
        [sys.executable, str(program_file(name)), *map(str, args)],
        env={k: v for k, v in environment.items() if v != ""},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def hear_signals() -> None:
    """For a child before it starts: background jobs of a shell ignore SIGINT, and what nohup started SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def signals_heard():
    return hear_signals


@pytest.fixture(autouse=True)
def no_output_in_the_repository(tmp_path, monkeypatch):
    """Whatever a test forgets, nothing is written under the repository's own data/, model/ or logs/."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    yield
    from medgemma_korean.cli import LogFile

    logger = logging.getLogger("medgemma_korean")
    for handler in list(logger.handlers):
        if type(handler) in (logging.StreamHandler, LogFile):  # ours; pytest has handlers there too
            handler.close()
            logger.removeHandler(handler)
    logger.propagate = True  # or pytest puts its own handlers there, and the next test's errors go to them


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A project root of this test's own (MEDGEMMA_KOREAN_ROOT) with a copy of data/sample/01_raw."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    return copy_sample(tmp_path)


@pytest.fixture
def synced(tmp_path, monkeypatch) -> list[str]:
    """What os.fsync is called for, in that order: paths below tmp_path, `.` for itself, parts without the process."""
    found, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)
        found.append(path.replace(f".{os.getpid()}.part", ".part"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


@pytest.fixture
def run_program(tmp_path):
    """run_program(name, *args, root=None, env=None, timeout=600) -> Outcome(code, stdout, stderr).

    Runs the shipped script/*/<name>.py in a process of its own; an environment variable given as "" is removed.
    """

    def run(name: str, *args: object, root: Path | None = None, **options) -> Outcome:
        return _run(name, *args, root=root or Path(os.environ.get("MEDGEMMA_KOREAN_ROOT") or tmp_path), **options)

    return run


@pytest.fixture
def load_program(monkeypatch):
    """load_program(name) -> the module of script/*/<name>.py, to call its functions or its main(argv) in process."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"program_{name}", program_file(name))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def refined_root(tmp_path_factory) -> Path:
    """A project root whose sample is refined, made once by the shipped refine_all. Read only."""
    root = copy_sample(tmp_path_factory.mktemp("refined"))
    outcome = _run("refine_all", root=root)
    assert outcome.code == 0, outcome.text
    return root


# downloads ----------------------------------------------------------------------------------------------


@pytest.fixture
def refined(refined_root, tmp_path, monkeypatch):
    """A copy of a refined project that is this test's own."""
    root = tmp_path / "root"
    shutil.copytree(refined_root, root)
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(root))
    from medgemma_korean.paths import RunPaths

    return RunPaths.of("tiny", "data/sample")


@pytest.fixture
def hub():
    """A hub of this test's own on 127.0.0.1; tests add repositories and order faults."""
    from hub_repositories import GATED, TOKEN
    from loopback_hub import Hub

    with Hub() as hub:
        hub.tokens = {TOKEN: set(GATED)}
        yield hub
    assert not hub.cdn_saw_authorization


def hub_environment(hub, tmp_path: Path) -> dict[str, str]:
    """For a program that is to know this hub and no other, whoever runs the tests."""
    from hub_repositories import environment

    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "")
    return proxies | {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "", **environment(hub)}


def assert_no_secrets(tmp_path: Path, printed: str) -> None:
    """No token and no signed address in what a program printed and wrote: logs, pins, records, progress."""
    small = (p for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".log", ".json", ".jsonl", ".txt"))
    for text in (printed, *(p.read_text(encoding="utf-8") for p in small)):
        assert not re.search("hf_[A-Za-z0-9]{8}|Bearer|X-Amz", text)


@pytest.fixture
def get(hub, tmp_path, run_program):
    """get(program, *args, **environment) -> Outcome: a program for medgemma-4b, from the hub, in a process of its own.

    get.begin(program, *args, within=[], reserve=None) -> Popen: does not wait for it. within: a command that runs it;
    reserve: the bytes that a download leaves free. get.in_terminal(program, *args) -> (what it shows, exit code).
    """
    (tmp_path / "data").mkdir(exist_ok=True)

    def get(program: str, *args: object, **environment: str) -> Outcome:
        environment = hub_environment(hub, tmp_path) | environment
        outcome = run_program(program, "--model", "medgemma-4b", *args, env=environment, timeout=60)
        assert_no_secrets(tmp_path, outcome.text)
        return outcome

    def begin(program: str, *args: object, within: Sequence[str] = (), reserve: float | None = None, output: int = -1):
        environment = {**os.environ, **hub_environment(hub, tmp_path), "MEDGEMMA_KOREAN_ROOT": str(tmp_path)}
        run = [str(program_file(program))]
        if reserve is not None:
            code = f"import runpy; from medgemma_korean import hub; hub.RESERVE = {reserve}; "
            run = ["-c", code + f"runpy.run_path({run[0]!r}, run_name='__main__')"]
        begun.append(
            subprocess.Popen(
                [*within, sys.executable, *run, "--model", "medgemma-4b", *map(str, args)],
                env={k: v for k, v in environment.items() if v != ""},
                cwd=tmp_path,
                stdout=output,  # -1 is subprocess.PIPE
                stderr=output if output >= 0 else subprocess.STDOUT,
                text=True,
                preexec_fn=hear_signals,
            )
        )
        return begun[-1]

    def in_terminal(program: str, *args: object) -> tuple[str, int]:
        terminal, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a new one has no size
        process, shown = begin(program, *args, output=side), b""
        os.close(side)
        with contextlib.suppress(OSError):  # so Linux says that the other side is closed
            while block := os.read(terminal, 65536):
                shown += block
        os.close(terminal)
        return shown.decode(), process.wait()

    begun: list[subprocess.Popen] = []
    get.begin, get.in_terminal = begin, in_terminal
    yield get
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """This process speaks to the hub as a program would, and never sleeps long: client is the list of its sleeps."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from medgemma_korean import transfer

    for name, value in hub_environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", constants.DOWNLOAD_CHUNK_SIZE)
    monkeypatch.setattr(transfer, "WAITS", (0.01,) * len(transfer.WAITS))
    sleeps, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (sleeps.append(seconds), sleep(min(seconds, 0.01)))[0])
    close_session()
    yield sleeps
    close_session()


@pytest.fixture
def get_here(client, tmp_path, monkeypatch, load_program, capfd):
    """As `get`, in this process: for what gives up after long waits, takes many runs, or needs a patch."""
    from huggingface_hub import constants

    from medgemma_korean import cli
    from medgemma_korean import hub as downloads

    (tmp_path / "data").mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(str(REPOSITORY / "script" / "download"))  # download_all calls its siblings
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def get_here(program: str, *args: object, **environment: str) -> Outcome:
        for name, empty in (("_fetched", []), ("_shown", set()), ("_resolved", set())):
            monkeypatch.setattr(downloads, name, empty)
        capfd.readouterr()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value) if value else patch.delenv(name, raising=False)
            patch.setattr(constants, "HF_HUB_OFFLINE", environment.get("HF_HUB_OFFLINE") == "1")
            code = cli.run(lambda: load_program(program).main(["--model", "medgemma-4b", *map(str, args)]))
        outcome = Outcome(code, *capfd.readouterr())
        assert_no_secrets(tmp_path, outcome.text)
        return outcome

    return get_here

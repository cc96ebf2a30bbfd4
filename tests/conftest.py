"""Shared fixtures: a project root of its own for every test, and the shipped programs run as a user runs them."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_RAW = REPOSITORY / "data" / "sample" / "01_raw"


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


@pytest.fixture(autouse=True)
def no_output_in_the_repository(tmp_path, monkeypatch):
    """Whatever a test forgets, nothing is written under the repository's own data/, model/ or logs/."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    yield
    logger = logging.getLogger("medgemma_korean")
    for handler in list(logger.handlers):
        if type(handler) in (logging.StreamHandler, logging.FileHandler):  # ours; pytest has handlers there too
            handler.close()
            logger.removeHandler(handler)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A project root of this test's own (MEDGEMMA_KOREAN_ROOT) with a copy of data/sample/01_raw."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    return copy_sample(tmp_path)


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

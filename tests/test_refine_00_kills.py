"""Refinement continues after any end: killed, stopped, a worker lost; the same bytes for any number of workers."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from korean_corpus import (
    as_namuwiki,
    begin,
    document,
    edited,
    make_root,
    outputs,
    raw_of,
    refined_of,
    run,
    shards_of,
)

SOURCES = ("wikipedia-korean", "namu_wiki", "aihub", "c4_korean", "books", "news", "notes", "papers", "talks", "web")
FORMATS = ("a.parquet", "a.jsonl", "a.jsonl.gz", "saved", "a.txt", "a.json")


class Whole:
    """A corpus of some forty megabytes in ten sources and six formats, and what an uninterrupted run makes of it."""

    def __init__(self, root: Path) -> None:
        rng = random.Random(30)
        korean: dict[str, list[str]] = {}
        seen: list[str] = []
        for number, source in enumerate(SOURCES):
            texts = [document(rng, length=(100, 500)) for _ in range(1200)]
            # Copies, exact and edited, of documents of this source and of those before.
            seen += texts[:200]
            texts += [text if i % 2 else edited(rng, text, 0.04) for i, text in enumerate(rng.sample(seen, 100))]
            rng.shuffle(texts)
            texts = list(map(as_namuwiki, texts)) if source == "namu_wiki" else texts
            for part in range(2):
                name = FORMATS[(2 * number + part) % len(FORMATS)]
                korean[f"{source}/{part}/{name}"] = texts[part::2]
        self.root = make_root(root / "raw", korean)
        self.size = sum(f.stat().st_size for f in raw_of(self.root).rglob("*") if f.is_file())
        self.outputs = {}
        for workers in (1, 3):
            here = self.copy(root / f"whole{workers}")
            code, printed = run(here, "--workers", workers)
            assert code == 0, printed
            self.outputs[workers] = outputs(here)

    def copy(self, to: Path) -> Path:
        """A root of its own with the same raw files."""
        shutil.copytree(raw_of(self.root), raw_of(to), copy_function=os.link)
        return to


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("kills"))


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """The program and its workers, as the end of a session or of a machine's memory does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    process.communicate(timeout=60)


def children(pid: int) -> list[int]:
    """The worker processes of a program; not the resource tracker of multiprocessing."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def wait_for(condition, seconds: float = 60, pause: float = 0.02):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
    return found


@pytest.mark.full
def test_the_number_of_workers_changes_nothing(whole):
    assert whole.size > 30e6
    assert set(whole.outputs[1]) == {
        f"{folder}/{name}"
        for folder in ("00_plain_text", "00_english_replay")
        for name in ("train.jsonl", "validation.jsonl", "ledger.json", "dropped.jsonl")
    }
    assert whole.outputs[1] == whole.outputs[3]


def has(place: str):
    return lambda root: (refined_of(root) / place).exists()


WORK = ".stages/refine_00_plain_text.partial"
# After what it is killed, and at most how many seconds later; the clock alone would miss a run on a busy machine.
MOMENTS = {
    "the start": (lambda root: True, 1.0),
    **{f"{n} shards": (lambda root, n=n: len(shards_of(root)) >= n, 0.6) for n in (1, 3, 6, 9)},
    "all shards": (lambda root: len(shards_of(root)) == len(SOURCES) + 1, 0.1),
    "the Korean duplicates": (has(f"{WORK}/00_plain_text/.parts"), 0.2),
    "a part of the Korean text": (has(f"{WORK}/00_plain_text/train.jsonl"), 0.2),
    "the Korean text": (has(f"{WORK}/00_english_replay"), 0.05),
    "one of the two folders": (has("00_plain_text"), 0.02),
}


@pytest.mark.full
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_and_run_again(whole, tmp_path, moment):
    root, (reached, most) = whole.copy(tmp_path), MOMENTS[moment]
    delay = random.Random(moment).uniform(0, most)
    process = begin(root, "--workers", 2)
    wait_for(lambda: reached(root) or process.poll() is not None, pause=0.002)
    time.sleep(delay)
    kill(process)
    finished = (refined_of(root) / ".stages/refine_00_plain_text.json").exists()
    made = shards_of(root)
    print(f"killed {delay:.2f} s after {moment}; {len(made)} shards made, finished: {finished}")
    code, printed = run(root, "--workers", 2, "--keep-shards")
    assert code == 0, printed
    assert outputs(root) == whole.outputs[1]
    if made and not finished:
        assert f"{len(made)} of {len(SOURCES) + 1} shards are there already" in printed
        assert {name: shards_of(root)[name] for name in made} == made
    assert not finished or moment == "one of the two folders"


@pytest.mark.full
def test_killed_again_and_again(whole, tmp_path):
    root, rng, code = whole.copy(tmp_path), random.Random(40), None
    for _ in range(12):
        process = begin(root, "--workers", rng.choice([1, 2, 3]))
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(rng.uniform(0.5, 3))
        kill(process)
        if code == 0:
            break
    assert code == 0 or run(root, "--workers", 2)[0] == 0
    assert outputs(root) == whole.outputs[1]


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("to", ["group", "program"])
def test_a_signal_ends_it_with_130_and_it_continues(whole, tmp_path, workers, to):
    root = whole.copy(tmp_path)
    process = begin(root, "--workers", workers)
    wait_for(lambda: len(shards_of(root)) >= 2)
    at_work = children(process.pid)
    (os.killpg if to == "group" else os.kill)(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130, printed
    assert printed.strip().split("\n")[-1] == "interrupted (SIGTERM); run the same command again to continue"
    assert "Traceback" not in printed and "error" not in printed
    wait_for(lambda: not any(map(alive, at_work)), 2)
    made = shards_of(root)
    code, printed = run(root, "--workers", workers)
    assert code == 0 and f"{len(made)} of {len(SOURCES) + 1} shards are there already" in printed
    assert outputs(root) == whole.outputs[1]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.full
def test_workers_end_with_their_parent(whole, tmp_path):
    root = whole.copy(tmp_path)
    process = begin(root, "--workers", 3)
    workers = wait_for(lambda: len(shards_of(root)) >= 1 and children(process.pid))
    assert len(workers) == 3
    process.kill()
    process.wait()
    begun = time.monotonic()
    wait_for(lambda: not any(map(alive, workers)), 2)
    print(f"the workers ended {time.monotonic() - begun:.2f} s after their parent")
    process.communicate()


@pytest.mark.full
def test_a_killed_worker_is_one_message(whole, tmp_path):
    root = whole.copy(tmp_path)
    process = begin(root, "--workers", 2)
    workers = wait_for(lambda: len(shards_of(root)) >= 2 and children(process.pid))
    os.kill(workers[0], signal.SIGKILL)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert re.fullmatch(
        "error: a worker process was killed, perhaps for lack of memory: run again with fewer --workers; what was "
        "finished is kept\n",
        printed,
    ), printed
    assert not any(map(alive, workers)) and outputs(root) == {}
    made = shards_of(root)
    code, printed = run(root, "--workers", 1)
    assert code == 0 and f"{len(made)} of {len(SOURCES) + 1} shards are there already" in printed
    assert outputs(root) == whole.outputs[1]

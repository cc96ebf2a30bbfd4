"""Worker processes: every item once, errors as they were raised, no worker outlives its program."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medgemma_korean.cli import GateError, PipelineError
from medgemma_korean.workers import Workers, available

# A program, because a spawned worker imports what it is to run.
PROGRAM = """
import os, signal, sys, threading, time
from medgemma_korean import cli
from medgemma_korean.cli import PipelineError
from medgemma_korean.workers import Workers

prepared = []

def prepare(*settings):
    prepared.append(settings)

def square(n):
    time.sleep(0.02 * (n % 3))
    return n * n, prepared, os.getpid(), threading.active_count()

def fail(n):
    if n == 3:
        raise PipelineError("data/x.jsonl, line 7: not UTF-8 (byte 2)")
    if n == 5:
        raise OSError(28, "No space left on device", "data/x")
    if n == 7:
        return {}["a bug"]
    time.sleep(30 if n == 4 else 0)

def full(n):
    if n == 2:
        raise MemoryError
    return n

def die(n):
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return n

def wait(n):
    print(os.getpid(), flush=True)
    time.sleep(60)

def main():
    number, function, items = int(sys.argv[1]), globals()[sys.argv[2]], eval(sys.argv[3])
    with Workers(number, prepare, ("a", 1)) as workers:
        found = list(workers.map(function, items))
        if function is square:
            again = list(workers.map(square, [100]))
            assert again[0][:1] + again[0][1][:1] == (0, 10000)
            assert sorted((i, result[0]) for i, result in found) == [(i, n * n) for i, n in enumerate(items)]
            assert all(result[1] == [("a", 1)] for _, result in found)
            print(len({result[2] for _, result in found}), {result[2] for _, result in found} == {os.getpid()})

if __name__ == "__main__":
    sys.exit(cli.run(main))
"""


@pytest.fixture
def begin(tmp_path, signals_heard):
    """begin(number, function, items) -> the program above, in a process group of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    begun = []

    def begin(number: int, function: str, items: str) -> subprocess.Popen:
        begun.append(
            subprocess.Popen(
                [sys.executable, "program.py", str(number), function, items],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=signals_heard,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen, within: float = 20) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=within)
    return process.returncode, out, error


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids: list[int], within: float) -> bool:
    end = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize("number, items", [(1, "range(9)"), (2, "range(9)"), (3, "[5, 1, 4]"), (2, "[]")])
def test_every_item_has_its_result_and_every_worker_is_prepared(begin, number, items):
    code, out, error = ended(begin(number, "square", items))
    assert (code, error) == (0, "")
    used, here = out.split()
    # One worker needs no process of its own.
    assert here == str(number == 1) and int(used) <= number


def test_at_least_one_processor():
    assert 1 <= available() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "items, code, said",
    [
        ("[1, 3, 2]", 2, "error: data/x.jsonl, line 7: not UTF-8 (byte 2)\n"),
        ("[1, 5, 2]", 2, "error: no space left on the disk of data/x; free some and run again\n"),
    ],
)
def test_an_error_is_the_message_it_was_raised_with(begin, number, items, code, said):
    assert ended(begin(number, "fail", items)) == (code, "", said)


def test_a_bug_shows_where_it_is(begin):
    code, _, error = ended(begin(2, "fail", "[1, 7, 2]"))
    assert code == 1 and 'return {}["a bug"]' in error and "this is a bug" in error


def test_an_error_does_not_wait_for_the_others(begin):
    begun = time.monotonic()
    assert ended(begin(2, "fail", "[4, 3]"))[0] == 2
    assert time.monotonic() - begun < 15  # the other one sleeps for 30 seconds


@pytest.mark.parametrize("number", [1, 2])
def test_no_memory_left_is_one_message(begin, number):
    code, _, error = ended(begin(number, "full", "range(6)"))
    assert (code, error) == (
        2,
        "error: out of memory: run again with fewer --workers; what was finished is kept\n",
    )


@pytest.mark.parametrize("items", ["range(6)", "[2]"])
def test_a_worker_that_is_killed_is_one_message(begin, items):
    assert ended(begin(2, "die", items)) == (
        2,
        "",
        "error: a worker process was killed, perhaps for lack of memory: run again with fewer --workers; what was "
        "finished is kept\n",
    )


def test_a_worker_killed_between_two_rounds_is_one_message():
    with Workers(2, len, ((),)) as workers:
        assert sorted(workers.map(abs, [-1, 2])) == [(0, 1), (1, 2)]
        for process in list(workers._pool._processes.values()):
            process.kill()
            process.join()
        time.sleep(0.2)
        with pytest.raises(PipelineError, match="a worker process was killed"):
            list(workers.map(abs, [-1, 2]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_is_answered_by_the_program(begin, number):
    process = begin(2, "wait", "range(2)")
    workers = [int(process.stdout.readline()) for _ in range(2)]
    os.killpg(process.pid, number)
    code, _, error = ended(process)
    name = signal.Signals(number).name
    assert (code, error) == (130, f"interrupted ({name}); run the same command again to continue\n")
    assert all_end(workers, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_workers_start_prints_no_traceback_of_theirs(begin, number):
    """Each run is stopped a little later, from before the first worker to behind the start of both."""
    codes: list[int] = []
    for step in range(9):
        process = begin(2, "wait", "range(2)")
        time.sleep(0.25 + 0.05 * step)
        os.killpg(process.pid, number)
        code, _, error = ended(process)
        codes.append(code)
        if code == -number:  # the program had not come to answer signals
            continue
        assert error == f"interrupted ({signal.Signals(number).name}); run the same command again to continue\n", step
    assert codes[-1] == 130


def test_workers_end_within_two_seconds_of_a_killed_parent(begin):
    process = begin(2, "wait", "range(2)")
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    assert all_end(workers, 2)


@pytest.mark.parametrize("kind", [PipelineError, GateError])
def test_errors_cross_processes_with_their_message(kind):
    error = pickle.loads(pickle.dumps(kind("a.jsonl, line 3: 한글\nand more")))
    assert type(error) is kind and str(error) == "a.jsonl, line 3: 한글\nand more"
    assert error.exit_code == kind.exit_code

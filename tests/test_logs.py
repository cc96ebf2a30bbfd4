"""Logs that a person can read after a day, and that no secret ends up in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import re
import signal
import subprocess
import sys
import threading

import pytest

from medgemma_korean import cli, progress, records
from medgemma_korean.cli import log
from medgemma_korean.paths import RunPaths


@pytest.fixture
def paths(tmp_path):
    return RunPaths.of("tiny", "data/sample")


def files_of(file):
    """The log and what was cut off it, oldest first."""
    return [f for f in (file.with_name(f"{file.name}.2"), file.with_name(f"{file.name}.1"), file) if f.is_file()]


def lines_of(file):
    return [line for part in files_of(file) for line in part.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def alarm(seconds):
    def late(*_):
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# secrets ------------------------------------------------------------------------------------------------

SECRETS = {
    "token hf_AbCdEfGhIjKlMnOp failed": "hf_AbCdEfGhIjKlMnOp",
    "{'Authorization': 'Bearer abc.def-123'}": "abc.def-123",
    "authorization: Basic dXNlcjpwYXNz": "dXNlcjpwYXNz",
    "proxy http://somebody:pa55word@proxy.example:8080/x": "pa55word",
    "mirror https://onlytoken1@mirror.example/": "onlytoken1",
    "GET https://cdn.example/x?X-Amz-Signature=0f1e2d3c&part=1": "0f1e2d3c",
    "GET https://cdn.example/x?part=1&Signature=Zm9v~bar&Key-Pair-Id=K123": "Zm9v~bar",
    "WANDB_API_KEY=0123456789abcdef0123": "0123456789abcdef0123",
    "set key to my-own-k3y-in-the-environment": "my-own-k3y-in-the-environment",
    '"api_key": "sk-proj-1234567890"': "sk-proj-1234567890",
    "written by a.person@example.org": "a.person@example.org",
}


@pytest.fixture
def secret_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "my-own-k3y-in-the-environment")


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_masked(text, secret_environment):
    shown = cli.masked(text)
    assert SECRETS[text] not in shown and "***" in shown
    assert cli.masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "loss per token: 2.34567891",
        "token: 1.2345678e-05, 12,345,678 tokens",
        "revision 8f3a9c1d2b4e5f60718293a4b5c6d7e8f9a0b1c2",
        "https://opus.example/a@b/train.zip",
        "settings.new_tokens: 2048 -> 64",
        "model/00_trained/tiny/final has 12,345,678 bytes",
    ],
)
def test_numbers_hashes_and_paths_stay(text):
    assert cli.masked(text) == text


def test_a_traceback_is_masked_in_the_log_and_on_the_terminal(paths, capsys, secret_environment):
    cli.start_logging(paths, "train_00_plain_text")

    def main():
        raise RuntimeError("401 for https://user:pa55word@hub.example with hf_AbCdEfGhIjKlMnOp")

    assert cli.run(main) == cli.EXIT_BUG
    try:
        raise ValueError("my-own-k3y-in-the-environment")
    except ValueError:
        log.exception("and again")
    shown, written = capsys.readouterr(), paths.log.read_text()
    for text in (shown.out + shown.err, written):
        assert "RuntimeError: 401 for https://***@hub.example with ***" in text
        assert "ValueError: ***" in text and "Traceback" in text
        assert not any(secret in text for secret in ("pa55word", "hf_", "my-own-k3y"))


@pytest.mark.parametrize("text", ["a" * 200_000, "a-" * 100_000, "token=" * 30_000, "://a" * 50_000, "\x1b[" * 100_000])
def test_a_long_line_of_data_is_masked_in_time(text):
    """A regular expression that tries every start with every end would need hours."""
    with alarm(10):
        cli._CONTROLS.sub("", cli.masked(text))


def test_before_there_is_a_log_errors_are_masked_too(capsys):
    log.handlers.clear()

    def main():
        raise cli.PipelineError("hf_AbCdEfGhIjKlMnOp is refused\x1b[2J")

    assert cli.run(main) == cli.EXIT_INPUT
    assert capsys.readouterr().err == "error: *** is refused\n"


def test_events_are_masked_and_still_json(paths, secret_environment):
    for text in SECRETS:
        progress.event(paths, "download_model", text=text)
    written = paths.metrics.read_text(encoding="utf-8")
    assert not any(secret in written for secret in SECRETS.values())
    assert len([json.loads(line) for line in written.splitlines()]) == len(SECRETS)


def test_data_does_not_steer_a_terminal(paths, capsys):
    cli.start_logging(paths, "refine_00_plain_text")
    log.info("%s", "a\x1b[31mred\x1b[0m\rname\x1b]0;title\x07 \x9b2J\tand\nnext \udced\x95")
    expected = "aredname 2J\tand\nnext \\udced\n"
    assert capsys.readouterr().out == expected
    assert paths.log.read_text(encoding="utf-8").endswith(expected)


# a log that is gone -------------------------------------------------------------------------------------


def test_logs_that_are_moved_away_are_begun_anew(paths, capsys):
    cli.start_logging(paths, "train_00_plain_text")
    log.info("one")
    paths.logs.rename(paths.logs.with_name("kept"))
    log.info("two")
    assert lines_of(paths.log) == [line for line in lines_of(paths.log) if line.endswith(": two")] != []
    capsys.readouterr()


def test_a_log_that_cannot_be_written_ends_nothing(paths, capfd):
    cli.start_logging(paths, "train_00_plain_text")
    paths.logs.rename(paths.logs.with_name("kept"))
    paths.logs.write_text("a file where the folder was")

    def main():
        log.info("a line")
        raise cli.PipelineError("the cause")

    assert cli.run(main) == cli.EXIT_INPUT
    out, err = capfd.readouterr()
    assert out == "a line\nerror: the cause\n" and err == ""


# size ---------------------------------------------------------------------------------------------------

MOST = 20_000


@pytest.fixture
def small(monkeypatch):
    for module, name in ((cli, "LOG_BYTES"), (progress, "METRICS_BYTES")):
        monkeypatch.setattr(module, name, MOST)


def test_a_day_of_a_run_stays_small_and_right(paths, small, monkeypatch, capsys):
    """24 hours by a clock of our own: a line and an event every 30 seconds, the progress file every minute."""
    now = [1.8e9]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr(records.os, "fsync", lambda _: None)
    cli.start_logging(paths, "train_00_plain_text")
    steps = 24 * 60 * 2
    for step in range(1, steps + 1):
        now[0] += 30
        log.info("step %d of %d, loss %.3f, 12 345 tokens/s", step, steps, 3 / step)
        progress.event(paths, "train_00_plain_text", event="step", step=step, loss=3 / step, text="한국어")
        if step % 2 == 0:
            progress.update(
                paths,
                "train_00_plain_text",
                state="running",
                done=step,
                total=steps + 120,
                metric=f"loss {3 / step:.3f}",
            )
            with open(paths.log, "a") as file:  # as the driver's shell does
                file.write(f"2027-01-15 00:00:00 pipeline: minute {step // 2}\n")
    for file, limit in ((paths.log, cli.LOG_FILES), (paths.metrics, progress.METRICS_FILES)):
        parts = files_of(file)
        assert len(parts) == limit and set(parts) == set(file.parent.glob(f"{file.name}*"))
        assert all(part.stat().st_size < MOST + 400 for part in parts), [p.stat().st_size for p in parts]
    # Of what is left nothing is lost, doubled or cut.
    logged = [
        int(m[1]) for line in lines_of(paths.log) if (m := re.fullmatch(r".* step (\d+) of 2880, loss .*/s", line))
    ]
    assert logged == list(range(steps - len(logged) + 1, steps + 1)) and len(logged) > 400
    assert len(lines_of(paths.log)) - len(logged) == sum("pipeline: minute" in line for line in lines_of(paths.log))
    events = [json.loads(line) for line in lines_of(paths.metrics)]
    assert [e["step"] for e in events] == list(range(steps - len(events) + 1, steps + 1)) and len(events) > 200
    shown = paths.progress.read_text()
    assert re.search(r"train_00 +running +96 % +60 min .*loss 0\.001", shown), shown
    capsys.readouterr()


def test_processes_that_write_at_once_lose_no_line(paths, small):
    """Each rotates when it finds the log too long; a line goes to the old file or to the new one, whole."""
    code = (
        "import sys; from medgemma_korean import cli, progress; from medgemma_korean.paths import RunPaths\n"
        f"cli.LOG_BYTES = progress.METRICS_BYTES = {MOST}; cli.LOG_FILES = progress.METRICS_FILES = 50\n"
        "paths = RunPaths.of('tiny', 'data/sample'); cli.start_logging(paths, sys.argv[1])\n"
        "for i in range(1500):\n"
        "    cli.log.info('line %d of %s', i, 'x' * 60); progress.event(paths, sys.argv[1], i=i)\n"
    )
    programs = ("one", "two")
    running = [subprocess.Popen([sys.executable, "-c", code, p], stdout=subprocess.DEVNULL) for p in programs]
    assert [process.wait() for process in running] == [0, 0]
    written = [line for f in paths.logs.glob("pipeline_tiny.log*") for line in f.read_text().splitlines()]
    assert len(list(paths.logs.glob("pipeline_tiny.log*"))) > 2
    for program in programs:
        found = [
            int(re.fullmatch(rf".* {program}: line (\d+) of x{{60}}", line)[1]) for line in written if program in line
        ]
        assert sorted(found) == list(range(1500))
    events = [json.loads(line) for f in paths.logs.glob("metrics_tiny.jsonl*") for line in f.read_text().splitlines()]
    assert sorted((e["program"], e["i"]) for e in events) == [(p, i) for p in programs for i in range(1500)]


def test_threads_of_a_process_write_whole_lines(paths, small, capsys):
    cli.start_logging(paths, "download_model")
    threads = [
        threading.Thread(target=lambda n=n: [log.info("thread %d line %d", n, i) for i in range(200)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(re.fullmatch(r"\S+ \S+ download_model: thread \d line \d+", line) for line in lines_of(paths.log))
    assert len(lines_of(paths.log)) == 800
    capsys.readouterr()


def test_an_event_is_whole_or_not_there(paths, monkeypatch):
    progress.event(paths, "one", step=1)
    whole = paths.metrics.read_bytes()
    paths.metrics.write_bytes(whole + b'{"time": 1, "prog')  # of a writer that was killed
    progress.event(paths, "one", step=2)
    lines = paths.metrics.read_bytes().split(b"\n")
    assert json.loads(lines[2])["step"] == 2 and lines[3] == b""

    before, write = paths.metrics.read_bytes(), progress.os.write
    monkeypatch.setattr(progress.os, "write", lambda file, line: write(file, line[:5]))  # a disk that takes a part
    with pytest.raises(OSError, match="No space"):
        progress.event(paths, "one", step=3)
    assert paths.metrics.read_bytes() == before


def test_an_event_waits_for_the_line_that_another_process_is_writing(paths):
    progress.event(paths, "one", step=1)
    with open(paths.metrics, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b'{"program": "two", ')
        waiting = threading.Thread(target=progress.event, args=(paths, "one"), kwargs={"step": 2})
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        file.write(b'"step": 1}\n')
    waiting.join()
    assert [(e["program"], e["step"]) for e in map(json.loads, lines_of(paths.metrics))] == [
        ("one", 1),
        ("two", 1),
        ("one", 2),
    ]


def test_logging_of_a_library_with_a_traceback_does_not_pass_the_mask(paths):
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "hf_%s", ("AbCdEfGhIjKlMnOp",), None)
    assert cli._Mask().filter(record) and record.getMessage() == "***"

"""The progress file that a person looks at, and the state and events behind it."""

import errno
import fcntl
import json
import subprocess
import sys
import time

import pytest

from medgemma_korean import progress, records
from medgemma_korean.paths import DRIVER_STAGES, RunPaths


@pytest.fixture
def paths():
    return RunPaths.of("tiny", "data/sample")


def line_of(paths, stage):
    (line,) = [x for x in paths.progress.read_text(encoding="utf-8").splitlines() if x.split(" ")[0] == stage]
    return line.split()


@pytest.mark.parametrize(
    "program, stage",
    [
        ("download_00_plain_text", "download"),
        ("download_model", "download"),
        ("build_tiny_model", "download"),
        ("refine_02_kor_med_test", "refine"),
        ("prepare_tokenizer", "prepare_tokenizer"),
        ("add_lora", "add_lora"),
        ("train_00_plain_text", "train_00"),
        ("train_02_kor_med_test", "train_02"),
        ("report", "report"),
    ],
)
def test_every_program_belongs_to_a_driver_stage(program, stage):
    assert progress.stage_of(program) == stage and stage in DRIVER_STAGES


def test_a_line_a_stage_with_state_percent_time_left_and_metric(paths, monkeypatch):
    clock = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    progress.update(paths, "train_00_plain_text", state="running", percent=0.0)
    clock[0] += 100
    progress.update(paths, "train_00_plain_text", state="running", done=25, total=100, metric="loss 2.5")
    text = paths.progress.read_text(encoding="utf-8")
    assert text.startswith("run tiny, written ")
    assert [x.split(" ")[0] for x in text.splitlines()[3:]] == list(DRIVER_STAGES)
    line = line_of(paths, "train_00")
    assert line[1:6] == ["running", "25", "%", "5", "min"] and "loss 2.5" in " ".join(line)
    assert line_of(paths, "train_01") == ["train_01", "waiting"]
    progress.update(paths, "train_00_plain_text", state="complete", metric="4.2 bits")
    assert line_of(paths, "train_00")[1:4] == ["complete", "100", "%"]
    assert progress.read_state(paths)["stages"]["train_00"]["seconds"] == 100


def test_a_killed_process_does_not_spoil_the_time_left(paths, monkeypatch):
    clock = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    progress.update(paths, "train_00_plain_text", state="running", percent=0.0)
    state = json.loads(paths.progress_state.read_text())
    state["stages"]["train_00"]["pid"] = -1  # another process wrote it, yesterday
    paths.progress_state.write_text(json.dumps(state))
    clock[0] += 86_400
    progress.update(paths, "train_00_plain_text", state="running", percent=0.0)
    clock[0] += 10
    progress.update(paths, "train_00_plain_text", state="running", done=50, total=100)
    assert progress.read_state(paths)["stages"]["train_00"]["eta"] == pytest.approx(10)


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_stage_that_stopped_names_its_program(paths, state):
    progress.update(paths, "refine_01_medical_dict", state=state, metric="why")
    assert line_of(paths, "refine")[1] == state
    assert "refine_01_medical_dict: why" in paths.progress.read_text(encoding="utf-8")


ENTRY = {"state": "running", "program": "add_lora", "changed": 1.0, "pid": 1}
ODD = [5, {}, {"state": "running"}, ENTRY | {"pid": "x"}, ENTRY | {"changed": None}, ENTRY | {"percent": [1]}]
ODD += [ENTRY | odd for odd in ({"changed": 1e300}, {"changed": float("nan")}, {"changed": -1e300}, {"eta": 10**400})]
ODD += [
    ENTRY | odd for odd in ({"rate": "x"}, {"first": {}}, {"since": "x"}, {"cause": 3}, {"cause": "x", "advice": 3})
]
SHAPES = [json.dumps({"name": "tiny", "stages": {"train_00": entry}}).encode() for entry in ODD]
ENDED = {"outcome": "failed", "ended": 1.0, "message": "why"}
RUNNING = {"outcome": "running", "since": 1.0, "pid": 7}
RUNS = [3, [], None, {"outcome": "failed"}, {"outcome": ["x"]}, ENDED | {"ended": 1e300}, ENDED | {"message": None}]
RUNS += [{"outcome": "running"}, RUNNING | {"since": float("inf")}, RUNNING | {"pid": "x"}]
SHAPES += [json.dumps({"name": "tiny", "stages": {}, "run": run}).encode() for run in RUNS]
SHAPES += [b'{"name": "tiny", "stages": {}, "run": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("run", [ENDED, RUNNING, {"stage": "refine"}, {"outcoem": "done"}])
def test_a_sound_state_is_read_as_it_is(paths, run):
    paths.logs.mkdir(parents=True)
    state = {"name": "tiny", "stages": {"train_00": ENTRY | {"eta": None, "metric": "loss 1"}}, "run": run}
    paths.progress_state.write_text(json.dumps(state))
    assert progress.read_state(paths) == state
    assert ("1970" in progress.render(state).splitlines()[1]) == ("outcome" in run)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"stages": 3}', b'{"stages": {}}', b"\xff\xfe", *SHAPES])
def test_a_damaged_state_is_no_reason_to_stop(paths, damage):
    paths.logs.mkdir(parents=True)
    paths.progress_state.write_bytes(damage)
    assert progress.read_state(paths) == {"name": "tiny", "stages": {}}
    progress.update(paths, "add_lora", state="running")
    assert line_of(paths, "add_lora")[1] == "running"


def test_two_runs_have_two_files(paths, tmp_path):
    other = RunPaths.of("tiny", "data/sample", name="other")
    progress.update(paths, "add_lora", state="complete")
    progress.update(other, "add_lora", state="failed", metric="x")
    assert line_of(paths, "add_lora")[1] == "complete" and line_of(other, "add_lora")[1] == "failed"


def test_events_are_lines_of_json(paths):
    progress.event(paths, "train_00_plain_text", step=1, loss=2.5)
    progress.event(paths, "train_00_plain_text", step=2, note="간")
    rows = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    assert [(r["program"], r["step"]) for r in rows] == [("train_00_plain_text", 1), ("train_00_plain_text", 2)]
    assert rows[1]["note"] == "간" and all(isinstance(r["time"], float) for r in rows)


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (89, "89 s"), (720, "12 min"), (11_100, "3 h 05 min")])
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


# rate, and what needs words -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, text",
    [(12.34, "12.3/s"), (1.0, "1.0/s"), (0.5, "30.0/min"), (0.01, "36.0/h"), (8.5e6, "8.5M/s"), (2100, "2.1k/s")],
)
def test_rate(rate, text):
    assert progress.rate_text(rate) == text


def test_a_resumed_training_counts_from_where_it_began(paths, monkeypatch):
    clock = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    progress.update(paths, "train_00_plain_text", state="running", percent=0.0)
    for done in (900, 905, 910):  # 895 of them by an earlier process
        clock[0] += 10
        progress.update(paths, "train_00_plain_text", state="running", done=done, total=1000)
    entry = progress.read_state(paths)["stages"]["train_00"]
    assert entry["rate"] == pytest.approx(0.5) and entry["eta"] == pytest.approx(180)
    assert line_of(paths, "train_00")[2:7] == ["91", "%", "3", "min", "30.0/min"]
    clock[0] += 10  # another loop of the same program
    progress.update(paths, "train_00_plain_text", state="running", done=10, total=20)
    entry = progress.read_state(paths)["stages"]["train_00"]
    assert entry["rate"] == pytest.approx(10 / 40)
    progress.update(paths, "train_00_plain_text", state="complete")
    assert line_of(paths, "train_00")[1:4] == ["complete", "100", "%"] and "/min" not in paths.progress.read_text()


def test_why_a_stage_failed_stands_below_until_it_runs_again(paths):
    progress.update(paths, "train_00_plain_text", state="running", metric="loss 2")
    progress.update(paths, "train_00_plain_text", state="failed", cause="no space left\non x", advice="free some")
    text = paths.progress.read_text(encoding="utf-8")
    assert text.endswith("\n\ntrain_00_plain_text: no space left\non x\nfree some\n")
    assert line_of(paths, "train_00")[-3:] == ["train_00_plain_text:", "loss", "2"]
    progress.update(paths, "train_00_plain_text", state="running")
    assert "no space" not in paths.progress.read_text(encoding="utf-8")


def test_a_stage_that_is_not_heard_of(paths, monkeypatch):
    progress.update(paths, "train_00_plain_text", state="running")
    entry = progress.read_state(paths)["stages"]["train_00"]
    assert progress.quiet(entry) == ""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 720)
    assert progress.quiet(entry) == f"no sign of life for 12 min, process {entry['pid']} is alive"
    assert progress.quiet(entry, heard=now + 600) == ""  # the log, for instance
    progress.draw(paths)
    assert "train_00: no sign of life for 12 min" in paths.progress.read_text()
    assert progress.quiet(entry | {"boot_id": "another"}).endswith(" is gone")
    assert progress.quiet(entry | {"started_ticks": 1}).endswith(" is gone")  # the pid is another's by now


def test_what_became_of_the_driver(paths):
    progress.update(paths, "train_00_plain_text", state="interrupted")
    with progress.changing(paths) as whole:
        whole["run"] = {"outcome": "running", "since": time.time(), "pid": 7, "stage": "", "message": ""}
    assert paths.progress.read_text().splitlines()[1].startswith("driver: pid 7, since 2")
    progress.take(paths, 7, "x")
    progress.finish(paths, "interrupted", "train_00", "why")
    line = paths.progress.read_text().splitlines()[1]
    assert line.startswith("last run: interrupted, 2") and line.endswith(": why")
    assert not paths.pid.exists() and not paths.holder.exists()


# two writers --------------------------------------------------------------------------------------------

WRITER = """
import sys
from medgemma_korean import progress
from medgemma_korean.paths import RunPaths
paths, stage = RunPaths.of("tiny", "data/sample"), sys.argv[1]
for number in range(60):
    with progress.changing(paths) as whole:
        new = {"state": "running", "program": stage, "changed": 1.0, "pid": 1, "number": -1}
        seen = whole["stages"].setdefault(stage, new)
        assert seen["number"] == number - 1, f"an update of {stage} is lost: {seen}"
        seen["number"] = number
"""


def test_two_writers_lose_no_update(paths):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, stage]) for stage in ("train_00", "report")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    stages = progress.read_state(paths)["stages"]
    assert stages["train_00"]["number"] == stages["report"]["number"] == 59


def test_a_writer_that_was_stopped_holds_nobody_up(paths, monkeypatch):
    monkeypatch.setattr(progress, "LOCK_PATIENCE", 0.1)
    paths.logs.mkdir(parents=True)
    with open(paths.progress_lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        progress.update(paths, "add_lora", state="running")
    assert line_of(paths, "add_lora")[1] == "running"


def test_a_disk_without_locks(paths, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    progress.update(paths, "add_lora", state="running")
    assert line_of(paths, "add_lora")[1] == "running"
    paths.progress_lock.unlink()
    paths.progress_lock.mkdir()  # nothing that could be opened
    progress.update(paths, "add_lora", state="failed")
    assert line_of(paths, "add_lora")[1] == "failed"


def test_the_last_words_have_their_room(paths, monkeypatch):
    """On a full disk the state is written into what its lock file kept."""
    progress.update(paths, "add_lora", state="running")
    assert paths.progress_lock.stat().st_size == progress.RESERVE
    write = records.write_json

    def full(path, value):
        if paths.progress_lock.stat().st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    monkeypatch.setattr(records, "write_json", full)
    progress.update(paths, "add_lora", state="failed", cause="no space left")
    assert "no space left" in paths.progress.read_text()
    monkeypatch.setattr(records, "write_json", write)
    progress.update(paths, "add_lora", state="running")
    assert paths.progress_lock.stat().st_size == progress.RESERVE

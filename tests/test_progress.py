"""The progress file that a person looks at, and the state and events behind it."""

import json
import time

import pytest

from medgemma_korean import progress
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
SHAPES = [json.dumps({"name": "tiny", "stages": {"train_00": entry}}).encode() for entry in ODD]


def test_a_sound_state_is_read_as_it_is(paths):
    paths.logs.mkdir(parents=True)
    state = {"name": "tiny", "stages": {"train_00": ENTRY | {"eta": None, "metric": "loss 1"}}}
    paths.progress_state.write_text(json.dumps(state))
    assert progress.read_state(paths) == state


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

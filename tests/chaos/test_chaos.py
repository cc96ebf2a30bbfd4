"""Six chaos runs (minutes), forty with --full, and what the suite itself must notice. See run.py."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import faults
import pytest
import run
import world
from world import STAGES

SEED = 1
FORTY = 40
# Of the forty: kill -9 of the group, a moved clock, SIGTERM, a flipped bit in a checkpoint, a full disk, a flipped bit
# in what is complete; each training and the report among the stages.
SIX = (3, 9, 17, 18, 27, 33)
# Beside another process of pytest-xdist one at a time.
JOBS = 2 if (os.cpu_count() or 1) > 1 and "PYTEST_XDIST_WORKER" not in os.environ else 1


def show(rows: list[dict]) -> str:
    return "\n".join([run.HEADER, *map(run.line_of, rows), "", run.summary(rows)])


def assert_identical(rows: list[dict]) -> None:
    print(show(rows))
    failed = [f"{run.line_of(row)}\n{row['why']}" for row in rows if row["result"] not in ("identical", "skipped")]
    assert not failed, "\n".join(failed)
    for row in rows:
        if row["result"] == "skipped":
            print(f"run {row['run']} skipped: {row['why']}")


@pytest.mark.chaos
@pytest.mark.slow
def test_six_runs_end_as_the_uninterrupted_one(tmp_path):
    specs = [spec for spec in faults.plan(SEED, FORTY) if spec.number in SIX]
    assert_identical(run.series(specs, tmp_path, tmp_path / "results.jsonl", JOBS))


@pytest.mark.chaos
@pytest.mark.full
def test_forty_runs_end_as_the_uninterrupted_one(tmp_path):
    rows = run.series(faults.plan(SEED, FORTY), tmp_path, tmp_path / "results.jsonl", JOBS)
    assert_identical(rows)
    assert len(rows) == FORTY


def test_the_forty_are_of_every_kind_and_cut():
    specs = faults.plan(SEED, FORTY)
    assert specs == faults.plan(SEED, FORTY) and specs != faults.plan(SEED + 1, FORTY)
    kinds = Counter(spec.kind for spec in specs)
    assert set(kinds) == set(faults.KINDS) and min(kinds.values()) >= 4
    assert sum(spec.stages == STAGES for spec in specs) == 5
    assert all(len(spec.stages) == 2 for spec in specs if spec.stages != STAGES)
    assert {spec.cut for spec in specs} == set(range(len(STAGES) - 1))
    assert all(moment.stage in spec.stages for spec in specs for _, moment in spec.strikes)


def test_what_is_compared_finds_a_changed_byte_and_what_is_left_over(tmp_path):
    record = {"fingerprint": "a", "seconds": 1.5, "outputs": {"final/x": {"sha256": "1", "mtime_ns": 5}}}
    for name in ("one", "two"):
        folder = tmp_path / name / "model" / "00_trained" / "tiny"
        (folder / "final").mkdir(parents=True)
        (folder / "checkpoint-4").mkdir()
        (folder / "final" / "x").write_bytes(b"weights")
        (folder / "checkpoint-4" / "trainer_state.json").write_text(name)
        (folder / "stage.json").write_text(json.dumps({**record, "finished": name}))
    one, two = tmp_path / "one", tmp_path / "two"
    assert world.differences(one, two) == []
    folder = one / "model" / "00_trained" / "tiny"
    (folder / "final" / "x").write_bytes(b"weightz")
    (folder / "stage.json").write_text(json.dumps({**record, "fingerprint": "b"}))
    (folder.parent / ".tiny.partial").mkdir()
    (folder.parent / ".tiny.partial" / ".rows.json").touch()
    shutil.copytree(folder, folder.with_name("tiny.previous"))
    assert world.differences(one, two) == [
        "model/00_trained/.tiny.partial/.rows.json is left over",
        "model/00_trained/tiny/final/x differs",
        "model/00_trained/tiny/stage.json differs: fingerprint b instead of a",
    ]
    (folder / "final" / "x").unlink()
    assert "model/00_trained/tiny/final/x is missing" in world.differences(one, two)


def test_harm_is_done_behind_the_back_of_the_clock(tmp_path):
    import random

    file = tmp_path / "x"
    file.write_bytes(bytes(100))
    stat = file.stat()
    assert "flipped" in faults.harm(file, "flip", random.Random(1))
    assert sum(map(int.bit_count, file.read_bytes())) == 1
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (stat.st_mtime_ns, 100)
    assert "cut to" in faults.harm(file, "cut", random.Random(1))
    assert file.stat().st_size < 100 and file.stat().st_mtime_ns == stat.st_mtime_ns


def test_the_command_that_a_message_tells():
    same = ["./run_full_pipeline.sh", "--to", "train_00"]
    assert run.told_command("error: no space", same) is None
    assert run.told_command("To redo it and what depends on it, add --force (old ...)", same) == [*same, "--force"]
    told = run.told_command("x\nMake it again: python script/model/add_lora.py --model tiny --force\n", same)
    assert told[1:] == ["script/model/add_lora.py", "--model", "tiny", "--force"] and Path(told[0]).name == "python"

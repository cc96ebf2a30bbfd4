"""bench_evaluation.py, small: every way is measured on the same items, and the head makes logits of one position."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch_fixtures as tf

from medgemma_korean import records

PROGRAM = Path(__file__).with_name("bench_evaluation.py")


def run(*argv):
    return subprocess.run([sys.executable, str(PROGRAM), *map(str, argv)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_way_is_measured(tmp_path):
    records.write_jsonl(tmp_path / "dev.jsonl", tf.ITEMS)
    numbers = tmp_path / "numbers.json"
    done = run(
        "--only", "speed", "--base", tf.base_folder(), "--items", tmp_path / "dev.jsonl", "--number", 6,
        "--batch", 3, "--rounds", 1, "--json", numbers,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(numbers.read_text())["speed"]
    assert list(found) == ["letter", "letter, one by one", "generate, batched", "generate, one by one"]
    assert all(entry["items"] == 6 and entry["seconds"] > 0 and entry["cpu"] > 0 for entry in found.values())
    assert found["generate, one by one"]["times"] == 1 < found["letter"]["cpu_times"]
    for name, entry in found.items():
        assert f"{name}  " in done.stdout and f"{entry['times']:.1f}" in done.stdout


@pytest.mark.slow
def test_memory_is_far_below_all_logits(tmp_path):
    numbers = tmp_path / "numbers.json"
    small = ("--rows", 60_000, "--hidden", 128, "--layers", 2, "--batch", 4, "--length", 512)
    done = run("--only", "memory", *small, "--json", numbers)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(numbers.read_text())["memory"]
    assert found["rows"] == 60_000 and found["logits"] == 4 * 512 * 60_000 * 4
    assert found["weights"] > 60_000 * 128 * 4
    assert found["peak"] < 0.6 * found["logits"]  # with them all it would be more than they are


def test_speed_needs_a_model():
    done = run("--only", "speed")
    assert (done.returncode, done.stderr) == (2, "error: --base and --items are needed for the speed table\n")

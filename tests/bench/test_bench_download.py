"""bench_download.py, small: every way makes the served files, and the numbers are numbers. No speed is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("bench_download.py")


@pytest.mark.slow
def test_every_way_of_every_case_is_measured(tmp_path):
    command = [sys.executable, PROGRAM, "--gb", "0.02", "--rounds", "1", "--folder", tmp_path, "--json", tmp_path / "n"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "n").read_text())["cases"]
    assert len(cases) == 3
    for ways in cases.values():
        assert list(ways) == ["download_model", "hf download", "Transfer", "snapshot_download"]
        for (run,) in ways.values():
            assert 0 < run["wall"] < 300
            assert 0 < run["user"] + run["system"] < 300
            assert 20e6 < run["memory"] < 2e9
    assert done.stdout.count("\n") == 2 + 3 * 4  # the table
    assert [p.name for p in tmp_path.iterdir()] == ["n"]  # and nothing is left behind

"""bench_refine.py, small: every way finds what it must of what was planted, and the numbers are numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("bench_refine.py")
WAYS = ["program", "parts", "datasets, batched", "datasets, by row", "datatrove", "datatrove's filters", "signatures"]


@pytest.mark.slow
def test_every_way_is_measured_and_scored(tmp_path):
    command = [sys.executable, PROGRAM, "--mb", "4", "--rounds", "1", "--signatures", "20000"]
    command += ["--folder", tmp_path, "--json", tmp_path / "n"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "n").read_text())
    assert numbers["made"]["4"]["bytes"] == pytest.approx(4e6, rel=0.05)
    runs = numbers["runs"]["4"]
    assert list(runs) == WAYS
    for (run,) in runs.values():
        assert 0 < run["cpu"] < 600 and 0 < run["wall"] < 600
        assert 20e6 < run["anonymous"] < run["rss"] < 2e9
    ours = runs["program"][0]["found"]
    assert ours["lost"] == 0 and ours["plain"] > 300
    assert {ours[what] for what in ("exact copies", "exam items", "unwanted pages")} == {1.0}
    assert ours["near copies"] >= 0.95
    # All three clean and filter with the same functions.
    assert len({runs[way][0]["found"]["kept"] for way in WAYS[1:4]}) == 1
    assert runs["signatures"][0]["found"]["near copies"] >= 0.95
    assert [p.name for p in tmp_path.iterdir()] == ["n"]  # and nothing is left behind

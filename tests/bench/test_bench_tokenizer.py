"""bench_tokenizer.py, small: a base of the size asked for, an extension that shortens Korean, numbers in the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("bench_tokenizer.py")


@pytest.mark.slow
def test_both_tokenizers_are_measured(tmp_path):
    command = [sys.executable, PROGRAM, "--mb", "1", "--pieces", "2500", "--ids", "6000", "--tokens", "300"]
    command += ["--min-count", "5", "--rounds", "1", "--folder", tmp_path, "--json", tmp_path / "n"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "n").read_text())
    assert numbers["made"]["ids"] == 6000 and numbers["made"]["merges"] > 4500
    for name in ("learn", "whole"):
        run = numbers[name]
        assert run["new"] == 300 and run["words"] > 10_000
        assert 0 < sum(run["seconds"].values()) < run["wall"] < 600
        assert 50e6 < run["anonymous"] < run["rss"] < 2e9
    compare = numbers["compare"]
    lengths = compare["tokens per character, Korean"]
    assert lengths["extended"] < 0.95 * lengths["base"]
    assert compare["tokens per character, Latin"]["extended"] == compare["tokens per character, Latin"]["base"]
    assert all(value > 0 for both in compare.values() for value in both.values())
    assert done.stdout.startswith("6,000 ids, ") and "| encode Korean, MB/s | " in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["n"]  # and nothing is left behind

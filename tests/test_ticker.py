"""A bar with the time left in a terminal, plain lines in logs."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from medgemma_korean import cli, ticker
from medgemma_korean.ticker import Ticker


def test_lines_with_the_time_left(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, logger="medgemma_korean"), Ticker("02", seconds=60) as tick:
        for done in range(1, 11):
            now[0] += 30
            tick(done, 10)
        now[0] += 30
        tick(2, 10)  # a second pass begins
        now[0] += 60
        tick(4, 10)
    assert [record.message for record in caplog.records] == [
        "02: 2 of 10, about 4 min left",
        "02: 4 of 10, about 3 min left",
        "02: 6 of 10, about 2 min left",
        "02: 8 of 10, about 60 s left",
        "02: 10 of 10, about 0 s left",
        "02: 4 of 10, about 2 min left",
    ]


LOOP = """
import time
from medgemma_korean.ticker import Ticker
with Ticker("merged") as tick:
    for done in range(0, 41, 4):
        tick(done, 40)
        time.sleep(0.02)
print("ended")
"""


def test_a_terminal_has_a_bar_that_goes_away():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a bar needs columns
    done = subprocess.Popen([sys.executable, "-c", LOOP], stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    assert done.wait(60) == 0
    shown = text.decode()
    assert re.search(r"merged: +\d+%.*\d+/40 \[\d\d:\d\d<", shown) and shown.rstrip().endswith("ended")
    assert "merged" not in shown.split("\r")[-1]  # the last line is the program's own


def test_no_bar_in_a_file():
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


@pytest.mark.parametrize("seconds", [0, -1])
def test_every_call_where_no_time_is_set(caplog, seconds):
    with caplog.at_level(logging.INFO, logger="medgemma_korean"):
        tick = Ticker("x", seconds)
        tick(1, 2)
        tick(2, 2)
    assert len(caplog.records) == 2 and ticker.SECONDS == 60 and isinstance(tick.every, cli.Every)

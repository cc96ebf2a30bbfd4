"""Progress of a long loop: a bar with the time left in a terminal, a plain line a minute anywhere else.

with Ticker("02") as tick:
    for done in range(total):
        tick(done + 1, total)
"""

from __future__ import annotations

import sys
import time
from typing import Any

from medgemma_korean import cli
from medgemma_korean.cli import log
from medgemma_korean.progress import duration

SECONDS = 60


class Ticker:
    """Call it with (done, total); "done" may start anew, as it does when a second pass begins."""

    def __init__(self, name: str, seconds: float = SECONDS) -> None:
        self.name, self.every = name, cli.Every(seconds)
        self.terminal = sys.stderr.isatty() and sys.stdout.isatty()
        self.bar: Any = None
        self._begin(0)

    def _begin(self, done: int) -> None:
        self.started, self.last = time.monotonic(), done

    def __call__(self, done: int, total: int) -> None:
        if done < self.last:
            self._close()
            self._begin(0)
        self.last = done
        if self.terminal:
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(desc=self.name, total=total, leave=False, file=sys.stderr)
            self.bar.update(done - self.bar.n)
        elif self.every():
            left = (time.monotonic() - self.started) / max(done, 1) * (total - done)
            log.info("%s: %d of %d, about %s left", self.name, done, total, duration(left))

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Ticker:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

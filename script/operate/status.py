"""Say how a run is going: `./run_full_pipeline.sh --status [--json]`.

Reads   logs/progress_<name>.json, logs/pipeline_<name>.{lock,lock.json,log}
Writes  nothing

    python script/operate/status.py --model medgemma-4b
    python script/operate/status.py --model medgemma-4b --json
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from medgemma_korean import cli, progress, records
from medgemma_korean.paths import DRIVER_STAGES, RunPaths, show

TAIL = 8192  # bytes of the log's end in which its last line is looked for


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty where there is none."""
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def collect(paths: RunPaths) -> dict[str, Any]:
    """Everything that is known about the run, as `--json` prints it."""
    state = progress.read_state(paths)
    stages = state["stages"]
    driver, held = progress.driver_of(paths), progress.holder_of(paths)
    now = time.time()
    return {
        "name": paths.name,
        "model": paths.model,
        "running": driver is not None,
        "pid": driver,
        "since": round(held["since"]) if driver and held else None,
        "host": held["host"] if held else None,
        # Who drove the run and could not say that it ended, and why.
        "stale": {"pid": held["pid"], "since": round(held["since"]), "why": progress.why_gone(held)}
        if held and driver is None
        else None,
        # Processes that a killed driver left behind.
        "left_over": progress.lock_holders(paths) if driver is None else [],
        # The last start of the driver: its outcome is done, gate, failed, interrupted, or running.
        "run": state.get("run"),
        "stages": {stage: stages.get(stage, {"state": "waiting"}) for stage in DRIVER_STAGES},
        # What a stage at work says, else how long ago it was heard of, in seconds.
        "quiet": {
            stage: {
                "seconds": round(now - heard(entry, paths), 1),
                "alive": progress.is_at_work(entry),
                "text": progress.quiet(entry, heard(entry, paths)),
            }
            for stage, entry in stages.items()
            if entry["state"] == "running"
        },
        "last_line": last_line(paths.log),
        "log": str(paths.log),
        "progress": str(paths.progress),
    }


def heard(entry: dict[str, Any], paths: RunPaths) -> float:
    """When a stage that runs was heard of last: it changed the progress state, the log or the metrics."""
    times = [file.stat().st_mtime for file in (paths.log, paths.metrics) if file.is_file()]
    return max(entry["changed"], *times) if times else entry["changed"]


def driver_lines(status: dict[str, Any]) -> list[str]:
    """A line about the driver, or about what is there without one, and one for each stage that is quiet."""
    quiet = [f"{stage}: {entry['text']}" for stage, entry in status["quiet"].items() if entry["text"]]
    continues = "the same command continues"
    if status["running"]:
        since = progress.moment(status["since"])
        return [f"driver: running since {since}, pid {status['pid']} on {status['host']}", *quiet]
    if status["left_over"]:
        left = ", ".join(map(str, status["left_over"]))
        return [f"driver: gone, but its stage still runs (pid {left}); --stop ends it with its state saved", *quiet]
    if stale := status["stale"]:
        began = f"pid {stale['pid']} on {status['host']}, which began {progress.moment(stale['since'])}"
        return [f"driver: gone ({began}): {stale['why']}; {continues}", *quiet]
    for stage, entry in status["stages"].items():
        if entry["state"] == "running" and status["quiet"][stage]["alive"]:
            return [f"driver: not running; {entry['program']} was started by itself, pid {entry['pid']}", *quiet]
    if quiet:
        return [f"driver: not running; {continues}", *quiet]
    return ["driver: not running"]


def text_of(status: dict[str, Any], paths: RunPaths) -> str:
    if not paths.progress_state.is_file() and not status["running"]:
        return f"run {paths.name}: nothing has run yet ({show(paths.progress)} does not exist)"
    state = progress.read_state(paths)
    if (state.get("run") or {}).get("outcome") == "running":
        del state["run"]  # the lines below know better
    lines = [progress.render(state, quietness=False).rstrip("\n"), "", *driver_lines(status)]
    if status["last_line"]:
        lines.append(f"log: {show(paths.log)}, its last line:\n  {status['last_line']}")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, force=False)
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    status = collect(paths)
    print(records.dump(status) if args.json else text_of(status, paths))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

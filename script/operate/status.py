"""Say how a run is going: `./run_full_pipeline.sh --status [--json]`.

Reads   logs/progress_<name>.json, logs/pipeline_<name>.{pid,lock,log}
Writes  nothing (with --set: the progress file, which is how the driver notes what no program can)

    python script/operate/status.py --model medgemma-4b
    python script/operate/status.py --model medgemma-4b --json
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path
from typing import Any

from medgemma_korean import cli, progress, records
from medgemma_korean.paths import DRIVER_STAGES, RunPaths, show

TAIL = 8192  # bytes of the log's end in which its last line is looked for
STATES = ("running", "complete", "skipped", "interrupted", "failed", "gate")


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
    stages = progress.read_state(paths)["stages"]
    driver = progress.driver_of(paths)
    return {
        "name": paths.name,
        "model": paths.model,
        "running": driver is not None,
        "pid": driver,
        "since": round(paths.pid.stat().st_mtime) if driver else None,
        # Processes that a killed driver left behind.
        "left_over": progress.lock_holders(paths) if driver is None else [],
        "stages": {stage: stages.get(stage, {"state": "waiting"}) for stage in DRIVER_STAGES},
        "last_line": last_line(paths.log),
        "log": str(paths.log),
        "progress": str(paths.progress),
    }


def driver_line(status: dict[str, Any]) -> str:
    """One line about the driver, or about what is there without one."""
    if status["running"]:
        since = datetime.datetime.fromtimestamp(status["since"])
        return f"driver: running since {since:%Y-%m-%d %H:%M:%S}, pid {status['pid']}"
    if status["left_over"]:
        left = ", ".join(map(str, status["left_over"]))
        return f"driver: gone, but its stage still runs (pid {left}); --stop ends it with its state saved"
    for stage, entry in status["stages"].items():
        if entry["state"] != "running":
            continue
        if progress.is_alive(entry["pid"]):
            return f"driver: not running; {entry['program']} was started by itself, pid {entry['pid']}"
        return f"driver: not running; {stage} ended without a word (killed?), and the same command continues"
    return "driver: not running"


def text_of(status: dict[str, Any], paths: RunPaths) -> str:
    if not paths.progress_state.is_file() and not status["running"]:
        return f"run {paths.name}: nothing has run yet ({show(paths.progress)} does not exist)"
    shown = progress.render(progress.read_state(paths)).rstrip("\n")
    lines = [shown, "", driver_line(status)]
    if status["last_line"]:
        lines.append(f"log: {show(paths.log)}, its last line:\n  {status['last_line']}")
    return "\n".join(lines)


def holder_line(paths: RunPaths) -> str:
    """Who has the run's lock, for a second start."""
    if driver := progress.driver_of(paths):
        return f"the run {paths.name} is at work already, pid {driver}; see --status, end it with --stop"
    left = ", ".join(map(str, progress.lock_holders(paths))) or "unknown"
    return f"a stage of the run {paths.name} is still at work without its driver, pid {left}; end it with --stop"


def note(paths: RunPaths, stage: str, state: str) -> None:
    """Set a stage's state in the progress file, unless the stage's own program has set it already."""
    entry = progress.read_state(paths)["stages"].get(stage, {})
    if entry.get("state") != state:
        # A skipped stage has no program and no last number.
        metric = "" if state == "skipped" else None
        progress.update(paths, entry.get("program", stage), stage, state=state, metric=metric)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, force=False)
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument("--holder", action="store_true", help="one line: who has the run's lock")
    parser.add_argument("--set", nargs=2, metavar=("STAGE", "STATE"), help=f"note a state: {', '.join(STATES)}")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    if args.set:
        stage, state = args.set
        if stage not in DRIVER_STAGES or state not in STATES:
            raise cli.PipelineError(
                f"--set {stage} {state}: no such stage or state; the stages are "
                f"{' '.join(DRIVER_STAGES)}, the states {', '.join(STATES)}"
            )
        note(paths, stage, state)
    elif args.holder:
        print(holder_line(paths))
    elif args.json:
        print(records.dump(collect(paths)))
    else:
        print(text_of(collect(paths), paths))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

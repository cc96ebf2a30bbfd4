"""End a run so that the same command continues it: `./run_full_pipeline.sh --stop`.

Reads   logs/pipeline_<name>.{pid,lock}
Writes  nothing of its own; the stage saves its state and the driver removes its pid file

    python script/operate/stop.py --model medgemma-4b

Exit codes: 0 it has ended, 2 nothing runs, or it has not ended within a minute (it will).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from medgemma_korean import cli, progress
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths

PATIENCE = 60.0  # seconds; a training ends its step and saves a checkpoint first


def left_behind(paths: RunPaths) -> list[int]:
    """The stage that a killed driver left at work."""
    left = progress.lock_holders(paths)
    # The driver starts each stage as the leader of a session; what such a leader started ends with it.
    leaders = [pid for pid in left if progress.is_alive(pid) and os.getsid(pid) == pid]
    return leaders or left


def what_runs(paths: RunPaths) -> str:
    for stage, entry in progress.read_state(paths)["stages"].items():
        if entry["state"] == "running":
            return f"{stage} ({entry['program']}) to save its state"
    return "the driver to end"


def clean_up(paths: RunPaths) -> None:
    """What the driver would have done at its end."""
    paths.pid.unlink(missing_ok=True)
    for stage, entry in progress.read_state(paths)["stages"].items():
        if entry["state"] == "running":
            progress.update(paths, entry["program"], stage, state="interrupted")


def make_parser() -> argparse.ArgumentParser:
    return cli.make_parser(__doc__, force=False)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    driver = progress.driver_of(paths)
    pids = [driver] if driver else left_behind(paths)
    if not pids:
        raise PipelineError(f"nothing of the run {paths.name} is running; --status says how it went")
    print(f"waiting for {what_runs(paths)}, pid {', '.join(map(str, pids))}", flush=True)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue  # it ended by itself just now
    deadline = time.monotonic() + PATIENCE
    while any(progress.is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise PipelineError(
                f"pid {', '.join(map(str, pids))} is still at its last step after {PATIENCE:.0f} s; it ends by itself "
                "when its state is saved (see --status)"
            )
        time.sleep(0.1)
    if driver is None:
        clean_up(paths)
    print("stopped; the same command continues")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""End a run so that the same command continues it: `./run_full_pipeline.sh --stop`, or at once: `--stop now`.

Reads   logs/pipeline_<name>.{lock,lock.json}
Writes  nothing of its own, unless the driver was killed: then what the driver would have written at its end

    python script/operate/stop.py --model medgemma-4b          # a training saves a checkpoint first
    python script/operate/stop.py --model medgemma-4b now      # the last checkpoint stands

Exit codes: 0 it has ended, 2 nothing runs, or it has not ended within a minute (it will).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time

from medgemma_korean import cli, progress
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths

PATIENCE = 60.0  # seconds; a training ends its step and saves a checkpoint first
GRACE = 3.0  # seconds that `now` leaves before it kills
LAST_WORDS = 10.0  # seconds for a driver to write down that its stage is gone; it may have a command to run after that


def leaders(paths: RunPaths) -> list[int]:
    """The stages at work: the driver starts each as the leader of a session, and what it starts belongs to it."""
    found = []
    for pid in progress.lock_holders(paths):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == pid and not progress.is_driver(pid) and progress.is_alive(pid):
                found.append(pid)
    return found


def what_runs(paths: RunPaths) -> str:
    for stage, entry in progress.read_state(paths)["stages"].items():
        if entry["state"] == "running":
            return f"{stage} ({entry['program']}) to save its state"
    return "the driver to end"


def clean_up(paths: RunPaths) -> None:
    """What the driver would have done at its end."""
    last = ""
    for stage, entry in progress.read_state(paths)["stages"].items():
        if entry["state"] == "running":
            last = stage
            progress.update(paths, entry["program"], stage, state="interrupted")
    progress.finish(paths, "interrupted", last, "ended by --stop; the same command continues")


def tell(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)  # a driver that was stopped with Ctrl-Z hears nothing


def kill(groups: list[int]) -> None:
    """SIGKILL to process groups: the leader, and workers that would outlive it."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def gone(pids: list[int], seconds: float, paths: RunPaths) -> bool:
    """Whether the processes end within so many seconds. A driver that has said its last word counts as gone."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if progress.is_alive(pid)]:
        if not progress.lock_holders(paths) and not paths.pid.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return not left


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, force=False)
    parser.add_argument("when", nargs="?", choices=("now",), help="do not wait for a checkpoint")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    driver = progress.driver_of(paths)
    pids = [driver] if driver else leaders(paths) or progress.lock_holders(paths)
    if not pids:
        held = progress.holder_of(paths)
        if held and progress.is_elsewhere(held):
            raise PipelineError(f"the run {paths.name} was started on {held['host']}; stop it there")
        raise PipelineError(f"nothing of the run {paths.name} is running; --status says how it went")
    shown = ", ".join(map(str, pids))
    if args.when == "now":
        stages = leaders(paths)
        print(f"ending pid {shown} at once", flush=True)
        tell(pids)
        if not gone(pids, GRACE, paths):
            kill(stages + leaders(paths))
            if not gone(pids, LAST_WORDS, paths):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                gone(pids, LAST_WORDS, paths)
    else:
        print(f"waiting for {what_runs(paths)}, pid {shown}", flush=True)
        tell(pids)
        if not gone(pids, PATIENCE, paths):
            raise PipelineError(
                f"pid {shown} is still at its last step after {PATIENCE:.0f} s; it ends by itself "
                "when its state is saved (see --status), or at once with --stop now"
            )
    if progress.holder_of(paths) or driver is None:
        clean_up(paths)
    print("stopped; the same command continues")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

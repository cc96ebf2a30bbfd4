"""Write down what the driver knows and no stage's program can; `run_full_pipeline.sh` calls this, people need not.

Reads   logs/progress_<name>.json, logs/pipeline_<name>.lock.json
Writes  logs/progress_<name>.{txt,json}, logs/pipeline_<name>.{pid,lock.json}

    python script/operate/note.py begin --pid $$ --stages "download refine" --command "./run_full_pipeline.sh"
    python script/operate/note.py stage --stage download --state running
    python script/operate/note.py alive --pid $$                      # while that process lives
    python script/operate/note.py end --stage download --code 137 --message "stopped at download"
    python script/operate/note.py holder                              # who drives the run
    python script/operate/note.py words < output                      # into the log
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from medgemma_korean import cli, progress
from medgemma_korean.paths import DRIVER_STAGES, RunPaths, show

STATES = ("running", "complete", "skipped", "interrupted", "failed", "gate")
OUTCOMES = {0: "done", 3: "gate", 130: "interrupted"}  # any other exit code: failed
BEAT = 30.0  # seconds between two writings of the progress file
SILENCE = 300.0  # seconds without a beat after which a driver on a machine that is not seen from here counts as gone
LAST_WORDS = 200  # lines of what a command prints that go into the log
JUST_BEGUN = 5.0  # seconds from a driver's lock to its name beside it, on a busy machine


def begin(args: argparse.Namespace, paths: RunPaths) -> None:
    """The caller has the lock: the run is its, and what another one left here is out of date.

    Raises PipelineError where the lock could be had because somebody deleted its file.
    """
    if held := progress.holder_of(paths):
        if progress.is_at_work(held) and held["pid"] != args.pid:
            raise cli.PipelineError(
                f"the run {paths.name} is at work already, pid {held['pid']}, though its lock file was deleted; "
                "see --status, end it with --stop"
            )
        why = progress.why_gone(held) or "it could not say that it ended"
        since = progress.moment(held["since"])
        print(f"a stale lock is cleaned up: pid {held['pid']}, which began {since}, is gone; {why}")
    with progress.changing(paths) as whole:
        for stage, entry in whole["stages"].items():
            if entry["state"] == "running" and not progress.is_at_work(entry):
                entry["state"] = "interrupted"
            if stage in args.stages.split() and entry["state"] in ("interrupted", "failed", "gate", "skipped"):
                entry |= {"state": "waiting", "eta": None, "cause": None, "advice": None}
        whole["run"] = {"outcome": "running", "since": time.time(), "pid": args.pid, "stage": "", "message": ""}
    progress.take(paths, args.pid, args.command)  # last: who sees the pid finds the progress file too


def stage(args: argparse.Namespace, paths: RunPaths) -> None:
    """Set a stage's state, unless its own program has set it; say in one line why it did not end well."""
    entry = progress.read_state(paths)["stages"].get(args.stage, {})
    cause, advice = entry.get("cause"), entry.get("advice")
    if args.state in ("failed", "gate") and not (cause and entry["state"] == args.state):
        cause, advice = why(args.code, paths)
    # A skipped stage has no program and no last number.
    program, metric = entry.get("program", args.stage), "" if args.state == "skipped" else None
    if entry.get("state") != args.state or cause != entry.get("cause"):
        progress.update(paths, program, args.stage, state=args.state, metric=metric, cause=cause, advice=advice)
    with progress.changing(paths) as whole:
        if args.state == "running":
            # The program is still to begin; until then its driver answers for it.
            whole["stages"][args.stage] |= progress.process(args.pid)
            whole.setdefault("run", {})["stage"] = args.stage
    if args.state in ("failed", "gate"):
        print("; ".join(filter(None, [cause, advice])))


def why(code: int, paths: RunPaths) -> tuple[str, str]:
    """Cause and advice for a program that could not say so itself."""
    log = f"see the end of {show(paths.log)}"
    if code == 137:
        return "its process was killed, perhaps for lack of memory", f"{cli.MEMORY_ADVICE}; dmesg says who killed it"
    if code in (126, 127):
        return "its program cannot be started", f"script/setup_env.sh repairs the environment; {log}"
    if code > 128:
        return f"its process was ended by signal {code - 128}", f"this may be a bug; {log}"
    return f"it ended with exit code {code}", log


def alive(args: argparse.Namespace, paths: RunPaths) -> None:
    """Write the progress file again and again while the driver lives, so that its age means something."""
    driver, last = progress.process(args.pid), 0.0
    while progress.is_at_work(driver):
        if time.monotonic() - last > BEAT:
            with contextlib.suppress(OSError):  # a full disk; the next one may find room
                with progress.changing(paths):
                    last = time.monotonic()
        time.sleep(1)


def end(args: argparse.Namespace, paths: RunPaths) -> None:
    progress.finish(paths, OUTCOMES.get(args.code, "failed"), args.stage, args.message, args.pid)


def words(args: argparse.Namespace, paths: RunPaths) -> None:
    """Put what stands on stdin into the log alone, line by line, the last LAST_WORDS of it."""
    said = sys.stdin.buffer.read().decode("utf-8", "replace")
    lines = [line for line in said.replace("\r", "\n").split("\n") if line.strip()]
    for line in lines[-LAST_WORDS:]:
        cli.to_log(paths, "on-finish", line)


def holder(args: argparse.Namespace, paths: RunPaths) -> None:
    """One line about who drives the run; nothing where nobody does, unless the lock says that somebody must."""
    deadline = time.monotonic() + JUST_BEGUN
    # Who has just got the lock is about to write its name.
    while progress.driver_of(paths) is None and any(map(progress.is_driver, progress.lock_holders(paths))):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    held = progress.holder_of(paths)
    if held and (progress.is_at_work(held) or (progress.is_elsewhere(held) and (args.locked or beats(paths)))):
        since = progress.moment(held["since"])
        print(
            f"the run {paths.name} is at work already, pid {held['pid']} on {held['host']} since {since}; "
            "see --status, end it with --stop"
        )
    elif args.locked:
        left = ", ".join(map(str, progress.lock_holders(paths))) or "unknown"
        print(f"a stage of the run {paths.name} is still at work without its driver, pid {left}; end it with --stop")


def beats(paths: RunPaths) -> bool:
    """Whether somebody has written the progress file of late. All that is known on a shared disk without locks."""
    return paths.progress.is_file() and time.time() - paths.progress.stat().st_mtime < SILENCE


TASKS = {"begin": begin, "stage": stage, "alive": alive, "end": end, "holder": holder, "words": words}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, force=False)
    parser.add_argument("task", nargs="?", default="holder", choices=TASKS, help="what to write down, or to tell")
    parser.add_argument("--pid", type=int, help="the driver's")
    parser.add_argument("--command", default="", help="how the driver was started")
    parser.add_argument("--stages", default="", help="the stages that will run")
    parser.add_argument("--stage", default="", choices=("", *DRIVER_STAGES), metavar="S", help="a stage of the driver")
    parser.add_argument("--state", choices=STATES, help="its state")
    parser.add_argument("--code", type=int, default=0, help="the exit code of the stage or the driver")
    parser.add_argument("--message", default="", help="the driver's last word")
    parser.add_argument("--locked", action="store_true", help="holder: the lock is taken, so there is one")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    TASKS[args.task](args, paths)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""The chaos suite: the tiny pipeline is ended and damaged at seeded moments, continued, and compared with a whole run.

Reads   the repository; what an earlier start of the same series has finished
Writes  below --work: reference/ (the uninterrupted run), results_<seed>.jsonl, run_<n>/ of those that failed

    .venv/bin/python tests/chaos/run.py --seed 1 --runs 40           # all of it, at most an hour; ends with a table
    .venv/bin/python tests/chaos/run.py --seed 1 --runs 40 --list    # what would be done
    .venv/bin/python tests/chaos/run.py --seed 1 --runs 40 --only 7  # that run again

A run starts from a copy of the reference, cut after a seeded stage, and ends two stages later; one of eight is the
whole chain. A seeded fault befalls it at a seeded moment: before the n-th change of a file, or after a share of the
stage's time. Then the same command is given until it ends with 0. It must take no other command, but the one that a
message tells for a damaged file of a complete stage; every artefact must be that of the reference; and --verify must
pass. Runs that are done are not done again, unless they failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import faults
import world
from faults import Moment, Spec
from world import OPTIONS, REPOSITORY, STAGES, Attempt, Reference

STARTS = 12  # of the same command, beyond which a run counts as stuck
TRIES = 5  # with an earlier moment, where the command ended before the fault
HASTE = 0.7  # of the reference's time: a moment that comes too late costs a whole run
WAITS = 60  # seconds for what a killed driver or stage has left at work
SPACE = re.compile(r"no space", re.IGNORECASE)
PERMISSION = re.compile(r"permission|read-only", re.IGNORECASE)


class TooLate(Exception):
    """The command ended before the fault could befall it."""


class Problem(Exception):
    """What must not be: the run has failed."""


@dataclass
class Run:
    """One chaos run: its root, and what has happened to it."""

    spec: Spec
    reference: Reference
    home: Path
    root: Path
    tries: int
    rng: random.Random
    attempts: int = 0
    told: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged: Path | None = None

    @property
    def command(self) -> list[str]:
        return [str(world.DRIVER), *OPTIONS, "--to", STAGES[self.spec.last - 1]]

    def begin(self, command: list[str] | None = None, at: str = "") -> Attempt:
        clocks = self.spec.clocks
        setting = clocks[min(self.attempts, len(clocks) - 1)] if clocks else ""
        self.attempts += 1
        more = {"CHAOS_AT": at, **faults.clock(setting, self.spec.real_times)}
        control = self.home / "control" / str(self.attempts)
        output = self.home / f"output_{self.attempts}.txt"
        return Attempt.begin(command or self.command, self.root, control, output, **more)

    # the faults -----------------------------------------------------------------------------------------
    def strike(self, name: str, moment: Moment) -> None:
        """Start the command, and let the fault befall it. Raises TooLate when it ended before, Problem."""
        at = ""
        if moment.how == "change":
            at = f"{moment.stage} {max(1, round(moment.share * self.reference.changes[moment.stage]))}"
        attempt = self.begin(at=at)
        try:
            if not self.reach(attempt, moment):
                code = attempt.wait()
                if code:
                    raise Problem(f"ended with {code} before any fault: {attempt.text[-1500:]}")
                raise TooLate
            if name == "full disk":
                self.full_disk(attempt, moment)
            elif name == "read-only":
                self.read_only(attempt, moment)
            else:
                self.end(name, attempt, moment)
        finally:
            if attempt.running:
                world.kill_all(attempt.control)

    def reach(self, attempt: Attempt, moment: Moment) -> bool:
        """Wait for the moment; False when the command ended before it."""
        while attempt.running and not (
            attempt.due(moment.stage) if moment.how == "change" else attempt.entered(moment.stage)
        ):
            time.sleep(world.POLL)
        if moment.how == "time":
            end = time.monotonic() + moment.share * HASTE * self.reference.seconds[moment.stage]
            while attempt.running and time.monotonic() < end:
                time.sleep(world.POLL)
        return attempt.running

    def end(self, name: str, attempt: Attempt, moment: Moment) -> None:
        faults.end(name, attempt, moment)
        code, text = attempt.wait(), attempt.text
        expected = {
            "kill stage": (2,),
            "kill group": (-9,),
            "kill driver": (-9,),
            "term driver": (130,),
            "term stage": (130, 0),  # 0: it had nothing left to do
        }[name]
        if code not in expected and not (code == 0 and moment.how == "time"):
            raise Problem(f"{name}: exit code {code}, expected {expected}: {text[-1500:]}")
        if name == "kill stage" and code == 2 and "killed" not in text:
            raise Problem(f"{name}: the driver does not say so: {text[-1500:]}")
        require_no_traceback(text)

    def full_disk(self, attempt: Attempt, moment: Moment) -> None:
        before = faults.whole_checkpoints(self.root)
        faults.fill(self.root, self.spec.slack // 10 ** (self.tries - 1))
        attempt.let_go(moment.stage)
        code = attempt.wait()
        if code == 0:
            raise TooLate
        require_refusal("full disk", code, attempt.text, SPACE)
        self.notes.append(first_error(attempt.text))
        if moment.stage in world.TRAININGS and before and not newest(before) & faults.whole_checkpoints(self.root):
            raise Problem(f"full disk: of {before} the newest does not stand")
        again = self.begin()
        require_refusal("full disk, once more", again.wait(), again.text, SPACE)
        faults.empty(self.root)

    def read_only(self, attempt: Attempt, moment: Moment) -> None:
        open_again = faults.close(self.root / self.spec.folder)
        attempt.let_go(moment.stage)
        code = attempt.wait()
        if code == 0:
            open_again()
            if self.spec.folder == "logs":
                self.notes.append("read-only logs did not end it")
                return
            raise TooLate
        require_refusal("read-only", code, attempt.text, PERMISSION)
        self.notes.append(first_error(attempt.text))
        again = self.begin()
        require_refusal("read-only, once more", again.wait(), again.text, PERMISSION)
        open_again()

    def damage(self) -> None:
        partial = self.spec.of_partial
        files = faults.unfinished_files(self.root) if partial else faults.complete_files(self.root)
        if not files:
            raise TooLate
        if partial and self.rng.random() < 0.6:
            files = [p for p in files if re.search(r"/checkpoint-\d+/", str(p))] or files
        self.damaged = self.rng.choice(files)
        done = faults.harm(self.damaged, self.spec.damage, self.rng)
        self.notes.append(f"{self.damaged.relative_to(self.root)} {done}")

    # and after them -------------------------------------------------------------------------------------
    def go_on(self) -> None:
        """The same command until it ends with 0. Raises Problem when it does not, or takes other commands."""
        for _ in range(STARTS):
            attempt = self.begin()
            code, text = attempt.wait(), attempt.text
            if code == 0:
                return
            require_no_traceback(text)
            if code == 2 and "at work" in text:
                self.wait_for_others()
            elif code == 2 and "run the same command again" in text:
                continue
            elif code == 2 and (told := told_command(text, self.command)):
                self.obey(told, text)
            else:
                raise Problem(f"the same command ended with {code}: {text[-1500:]}")
        raise Problem(f"not done after {STARTS} starts")

    def wait_for_others(self) -> None:
        """What a kill has left at work ends by itself, as the message says."""
        end = time.monotonic() + WAITS
        while world.processes_of(self.home / "control"):
            if time.monotonic() > end:
                raise Problem("something is still at work a minute after the kill")
            time.sleep(0.2)

    def obey(self, told: list[str], text: str) -> None:
        """Run the command that a message tells. Only for a damaged file of a complete stage, which it must name."""
        if self.damaged is None or self.spec.of_partial:
            raise Problem(f"manual repair was asked for: {text[-1500:]}")
        if self.damaged.name not in text:
            raise Problem(f"{self.damaged.name} was damaged, and the message does not name it: {text[-1500:]}")
        self.told.append(" ".join(told).replace(str(REPOSITORY), "."))
        attempt = self.begin(told)
        if code := attempt.wait():
            raise Problem(f"the told command ended with {code}: {' '.join(told)}: {attempt.text[-1500:]}")

    def verify(self) -> None:
        """--verify passes; where a file that nobody has read is damaged, it names it, and tells what makes it again."""
        command = [str(world.DRIVER), "--verify"]
        attempt = self.begin(command)
        if attempt.wait() == 0:
            return
        told = told_command(attempt.text, self.command)
        if told is None:
            raise Problem(f"--verify: {attempt.text[-1500:]}")
        self.obey(told, attempt.text)
        self.go_on()
        attempt = self.begin(command)
        if attempt.wait():
            raise Problem(f"--verify, after {' '.join(told)}: {attempt.text[-1500:]}")

    def compare(self) -> None:
        if found := world.differences(self.root, self.reference.copy_after(self.spec.last)):
            raise Problem("not as the uninterrupted run:\n  " + "\n  ".join(found[:20]))

    def perform(self) -> None:
        """All of it. Raises TooLate, Problem."""
        for number, (name, moment) in enumerate(self.spec.strikes):
            for _ in range(self.tries - 1):
                moment = moment.earlier() if moment.how == "time" or self.spec.damage else moment
            self.wait_for_others()
            try:
                self.strike(name, moment)
            except TooLate:
                if number == 0:
                    raise
                self.notes.append(f"done before end {number + 1}")
                break
        if self.spec.damage:
            self.damage()
        self.go_on()
        self.verify()
        self.compare()


def newest(checkpoints: set[str]) -> set[str]:
    return {max(checkpoints, key=lambda name: int(name.rpartition("-")[2]))}


def first_error(text: str) -> str:
    """The first line that says what went wrong, cut to one of a terminal."""
    return next((line for line in text.splitlines() if line.startswith("error")), "no error was told")[:200]


def require_no_traceback(text: str) -> None:
    if "Traceback" in text or "this is a bug" in text:
        raise Problem(f"a traceback: {text[-3000:]}")


def require_refusal(what: str, code: int, text: str, says: re.Pattern) -> None:
    """Raise Problem unless a command ended with one message that says it, and 2."""
    require_no_traceback(text)
    if code != 2 or not says.search(text):
        raise Problem(f"{what}: exit code {code}, and the message is: {text[-1500:]}")


def told_command(text: str, same: list[str]) -> list[str] | None:
    """The command that a message tells to make a damaged result again."""
    if found := re.search(r"^(?:Make it again|To make it again): (.*--force.*)$", text, re.MULTILINE):
        words = shlex.split(found[1])
        return [str(REPOSITORY / ".venv/bin/python"), *words[1:]] if words[0] == "python" else words
    return [*same, "--force"] if re.search(r"add --force|same command with --force", text) else None


# series -------------------------------------------------------------------------------------------------


def perform(spec: Spec, reference: Reference, work: Path, mounts: bool) -> dict:
    """One run, with an earlier moment again where the command was quicker than the fault; its result, as a row."""
    home, began = work / f"run_{spec.number}", time.monotonic()
    row = {"run": spec.number, "kind": spec.kind, "cut": spec.cut, "last": spec.last, "fault": spec.fault}
    row["moments"] = "; ".join(str(moment) for _, moment in spec.strikes)
    if why := faults.lacking(spec, mounts):
        return {**row, "result": "skipped", "why": why, "seconds": 0}
    result, why, run = "FAILED", "always too late", None
    for tries in range(1, TRIES + 1):
        with world.root_from(reference.copy_after(spec.cut), home, spec.kind == "full disk") as root:
            run = Run(spec, reference, home, root, tries, random.Random(spec.seed))
            try:
                run.perform()
                result, why = "identical", ""
            except TooLate:
                continue
            except Problem as problem:
                why = str(problem)
        break
    if result == "identical":
        faults.remove(home)
    return {
        **row,
        "result": result,
        "why": why,
        "starts": run.attempts,
        "told": run.told,
        "notes": run.notes,
        "tries": run.tries,
        "seconds": round(time.monotonic() - began),
    }


def series(specs: list[Spec], work: Path, results: Path, jobs: int = 1) -> list[dict]:
    """The rows of these runs, in order; those that were done before are read, those that failed are done again."""
    work.mkdir(parents=True, exist_ok=True)
    world.kill_all(work)  # of an earlier start that was killed
    world.unmount_below(work)
    reference, mounts = world.make_reference(work), world.can_mount(work)
    rows = read_results(results)
    todo = [s for s in specs if rows.get(s.number, {}).get("result") != "identical"]
    todo.sort(key=lambda spec: len(spec.stages))  # whole chains last: they take the longest
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for done in concurrent.futures.as_completed(pool.submit(perform, s, reference, work, mounts) for s in todo):
            row = done.result()
            rows[row["run"]] = row
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(line_of(row), *([f"    {row['why'][:3000]}"] if row["why"] else []), sep="\n", flush=True)
    finally:
        world.stopping.set()
        world.kill_all(work)
        pool.shutdown(cancel_futures=True)
        world.stopping.clear()
    return [rows[s.number] for s in specs]


def read_results(file: Path) -> dict[int, dict]:
    """Run -> its newest row."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {row["run"]: row for row in map(json.loads, lines)}


HEADER = f"{'run':>3}  {'cut after':17}{'to':17}{'fault':58}{'starts':>6}{'s':>6}  result"


def line_of(row: dict) -> str:
    after = STAGES[row["cut"] - 1] if row["cut"] else "nothing"
    told = f", {len(row['told'])} told" if row.get("told") else ""
    return (
        f"{row['run']:3}  {after:17}{STAGES[row['last'] - 1]:17}{row['fault'][:56]:58}{row.get('starts', 0):6}"
        f"{row['seconds']:6}  {row['result']}{told}\n     at {row['moments']}"
        + "".join(f"\n     {note}" for note in row.get("notes", []))
    )


def summary(rows: list[dict]) -> str:
    lines = []
    for kind in faults.KINDS:
        of_kind = [row["result"] for row in rows if row["kind"] == kind]
        if of_kind:
            lines.append(f"{kind:24}{of_kind.count('identical'):3} of {len(of_kind)} identical")
            lines[-1] += f", {of_kind.count('skipped')} skipped" if "skipped" in of_kind else ""
    same = sum(row["result"] == "identical" for row in rows)
    lines.append(f"{same} of {len(rows)} end with the artefacts of the uninterrupted run")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these runs alone, done before or not")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; two on a quiet machine of two cores")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "medgemma_korean_chaos")
    parser.add_argument("--fresh", action="store_true", help="do runs again that are done")
    parser.add_argument("--list", action="store_true", help="print the runs and end")
    args = parser.parse_args(argv)
    specs = faults.plan(args.seed, args.runs)
    if args.only is not None:
        specs = [spec for spec in specs if spec.number in args.only]
    if args.list:
        for spec in specs:
            after = STAGES[spec.cut - 1] if spec.cut else "nothing"
            moments = "; ".join(str(moment) for _, moment in spec.strikes)
            print(f"{spec.number:3}  {after:17}{STAGES[spec.last - 1]:17}{spec.kind:24}{spec.fault}; {moments}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    began = time.monotonic()
    results = args.work / f"results_{args.seed}_{args.runs}.jsonl"
    if args.fresh:
        results.unlink(missing_ok=True)
    elif args.only is not None and results.is_file():
        rows = [row for row in read_results(results).values() if row["run"] not in args.only]
        results.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rows = series(specs, args.work.resolve(), results, args.jobs)
    print(HEADER, *map(line_of, rows), "", summary(rows), sep="\n")
    print(f"this start took {(time.monotonic() - began) / 60:.1f} min")
    return 0 if all(row["result"] in ("identical", "skipped") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What befalls a run: signals, full and read-only disks, damaged files, a clock that moves. Each at a seeded moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import world
from world import STAGES, TRAININGS, Attempt

FAKETIME = ("libfaketime.so.1", "libfaketimeMT.so.1")
KINDS = (
    "kill of the stage",
    "kill of the group",
    "SIGTERM to the driver",
    "SIGTERM to the stage",
    "several ends",
    "full disk",
    "read-only folder",
    "cut file",
    "flipped bit",
    "moved clock",
)
ENDS = ("kill stage", "kill group", "kill driver", "term driver", "term stage")
SLACK = (0, 30_000, 300_000, 3_000_000)  # bytes that are left on a disk as it becomes full
CLOCKS = (("+400d", "-3d", ""), ("-3d", "+400d", "-40d"), ("+30d", "", "+31d"))


@dataclass(frozen=True)
class Moment:
    """When: before a share of the changes of files that a stage makes, or after a share of its time."""

    stage: str
    how: str  # "change" or "time"
    share: float

    def __str__(self) -> str:
        return (
            f"{self.stage} {self.share:.0%} of its {self.how}s"
            if self.how == "change"
            else (f"{self.stage} {self.share:.0%} of its time")
        )

    def earlier(self) -> Moment:
        return replace(self, share=self.share * 0.6)


@dataclass(frozen=True)
class Spec:
    """One chaos run: from the copy after `cut` stages to the end of stage number `last` (counted from 1)."""

    number: int
    kind: str
    cut: int
    last: int
    strikes: tuple[tuple[str, Moment], ...]
    damage: str = ""  # "cut" or "flip", between the runs
    of_partial: bool = False  # what the stage that was ended had written, else what a complete one had
    clocks: tuple[str, ...] = ()  # one for each start of the command
    real_times: bool = False  # of files, whatever the clock says: as on a disk of another machine
    slack: int = 0
    folder: str = ""  # that becomes read-only
    seed: int = 0

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES[self.cut : self.last]

    @property
    def fault(self) -> str:
        """What befalls it, in a few words."""
        ends = ", ".join(name for name, _ in self.strikes)
        if self.damage:
            return f"{ends}, then {self.damage} {'unfinished' if self.of_partial else 'complete'} file"
        if self.clocks:
            return f"{ends}, clock {', '.join(clock or 'right' for clock in self.clocks)}"
        if "full disk" in ends:
            return f"{self.slack:,} bytes left"
        return f"{self.folder}/ read-only" if self.folder else ends


def plan(seed: int, runs: int) -> list[Spec]:
    """The seeded runs: every kind equally often, every cut too, and one of eight runs is the whole chain."""
    rng = random.Random(seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(runs)]
    cuts = [i % (len(STAGES) - 1) for i in range(runs)]
    whole = {i for i in range(runs) if i % 8 == 5}
    rng.shuffle(kinds)
    rng.shuffle(cuts)
    return [_spec(seed, i, kinds[i], 0 if i in whole else cuts[i], i in whole) for i in range(runs)]


def _spec(seed: int, number: int, kind: str, cut: int, whole: bool) -> Spec:
    rng = random.Random(f"{seed} {number} {kind}")
    last = len(STAGES) if whole else cut + 2
    stages = STAGES[cut:last]

    def moment(names: Iterable[str] = stages, by_change: float = 0.6) -> Moment:
        names = list(names)
        # Trainings have the most to lose.
        stage = rng.choices(names, [3 if name in TRAININGS else 1 for name in names])[0]
        return Moment(stage, "change" if rng.random() < by_change else "time", round(rng.uniform(0.02, 0.98), 3))

    spec = Spec(number, kind, cut, last, (), seed=rng.randrange(2**32))
    if kind == "kill of the stage":
        return replace(spec, strikes=(("kill stage", moment()),))
    if kind == "kill of the group":
        return replace(spec, strikes=((rng.choice(["kill group", "kill group", "kill driver"]), moment()),))
    if kind.startswith("SIGTERM"):
        return replace(spec, strikes=((f"term {kind.split()[-1]}", moment(by_change=0.4)),))
    if kind == "several ends":
        moments = sorted((moment() for _ in range(rng.choice([3, 4]))), key=lambda m: (STAGES.index(m.stage), m.share))
        return replace(spec, strikes=tuple((rng.choice(ENDS), m) for m in moments))
    if kind == "full disk":
        return replace(spec, strikes=(("full disk", moment(by_change=1.0)),), slack=rng.choice(SLACK))
    if kind == "read-only folder":
        folder = rng.choice(["model", "model", "data", "logs", "."])
        writes = {"model": STAGES[2:], "data": STAGES[:2]}.get(folder, STAGES)
        names = [name for name in stages if name in writes]
        if not names:
            folder, names = "model" if cut else "data", list(stages[:1])
        return replace(spec, strikes=(("read-only", moment(names, by_change=1.0)),), folder=folder)
    if kind in ("cut file", "flipped bit"):
        trainings = [name for name in stages if name in TRAININGS]
        of_partial = (bool(trainings) or cut == 0) and rng.random() < 0.6
        when = moment((trainings or ["refine"]) if of_partial else stages[1:], by_change=1.0)
        if of_partial:
            when = replace(when, share=round(rng.uniform(0.35, 0.95), 3))  # a checkpoint is there by then
        damage = "cut" if kind == "cut file" else "flip"
        return replace(spec, strikes=(("kill stage", when),), damage=damage, of_partial=of_partial)
    assert kind == "moved clock"
    strikes = tuple((rng.choice(ENDS), m) for m in sorted((moment(), moment()), key=lambda m: STAGES.index(m.stage)))
    return replace(spec, strikes=strikes, clocks=rng.choice(CLOCKS), real_times=rng.random() < 0.5)


def faketime() -> Path | None:
    """The library that moves the clock of a process, where it is installed."""
    found = [p for name in FAKETIME for p in Path("/usr/lib").glob(f"**/faketime/{name}")]
    return found[0] if found else None


def lacking(spec: Spec, mounts: bool) -> str | None:
    """Why this machine cannot do this run; None where it can."""
    if spec.kind == "full disk" and not mounts:
        return "a full disk is a small tmpfs, which only root may mount"
    if spec.kind == "read-only folder" and os.geteuid() == 0 and not mounts:
        return "root may write everywhere, and mount nothing here"
    if spec.kind == "moved clock" and faketime() is None:
        return "libfaketime is not installed (apt-get install faketime)"
    return None


def clock(setting: str, real_times: bool) -> dict[str, str]:
    """The environment in which the clock is moved."""
    if not setting:
        return {}
    found = {"LD_PRELOAD": str(faketime()), "FAKETIME": setting, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return found | ({"NO_FAKE_STAT": "1"} if real_times else {})


# strikes ------------------------------------------------------------------------------------------------


def end(name: str, attempt: Attempt, moment: Moment) -> None:
    """Send the signal of that name; who stands still at the moment goes on with it."""
    number = signal.SIGKILL if name.startswith("kill") else signal.SIGTERM
    with contextlib.suppress(ProcessLookupError):
        if name.endswith("stage"):
            os.kill(at_work(attempt, moment) or attempt.process.pid, number)
        else:
            os.kill(attempt.process.pid, number)
    if name == "kill group":
        world.kill_all(attempt.control)
    attempt.let_go(moment.stage)


def at_work(attempt: Attempt, moment: Moment) -> int | None:
    """The process that stands still at the moment, else the stage's own; None when the driver ends before there is one.

    A stage may have a process of its own for what takes memory, and that is the one that the kernel kills.
    """
    if attempt.due(moment.stage):
        return int((attempt.control / f"due_{moment.stage}").read_text())
    while attempt.running:
        if (pid := attempt.stage_pid()) is not None:
            return pid
    return None


def fill(root: Path, slack: int) -> None:
    """Leave `slack` bytes on the tmpfs of a root."""
    disk = os.statvfs(root)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    subprocess.run(["mount", "-o", f"remount,size={used + slack}", root], check=True)


def empty(root: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", root], check=True)


def close(folder: Path) -> Callable[[], None]:
    """Make a folder read-only; returns what opens it again. For root, whom no permission binds, by a mount."""
    if os.geteuid() == 0:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        return lambda: subprocess.run(["umount", "-l", folder], check=True)
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    modes = [p.stat().st_mode for p in folders]
    for place in folders:
        place.chmod(0o555)

    def open_again() -> None:
        for place, mode in zip(folders, modes, strict=True):
            place.chmod(mode)

    return open_again


# damage -------------------------------------------------------------------------------------------------


def unfinished_files(root: Path) -> list[Path]:
    """What an interrupted stage left: its work folder, but for what TensorBoard draws."""
    places = ("model/*/.*.partial/**/*", "data/sample/02_refined/.shards/*", "data/sample/*/.stages/*.partial/**/*")
    found = (p for place in places for p in root.glob(place) if p.is_file() and "runs" not in p.parts)
    return sorted(p for p in found if p.stat().st_size)


def complete_files(root: Path) -> list[Path]:
    """The outputs of every complete stage, the records among them, and the scores."""
    found = set((root / "model" / "report").glob("*/scores/*.json"))
    for record in (*root.glob("model/*/*/stage.json"), *root.glob("data/sample/02_refined/.stages/*.json")):
        about = json.loads(record.read_text())
        outputs = (record.parent / about["home"] / name for name in about["outputs"])
        found |= {record, *(p.resolve() for p in outputs if "runs" not in p.parts)}
    return sorted(p for p in found if p.is_file() and p.stat().st_size)


def harm(file: Path, how: str, rng: random.Random) -> str:
    """Cut a file or flip one bit in it, behind the back of whoever looks at its time; returns what was done."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    if how == "cut":
        length = rng.choice([0, len(content) // 2, len(content) - 1])
        content, done = content[:length], f"cut to {length:,} of {len(content):,} bytes"
    else:
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        content[place] ^= 1 << bit
        done = f"bit {bit} of byte {place:,} flipped"
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return done


def whole_checkpoints(root: Path) -> set[str]:
    return {str(p.parent.relative_to(root)) for p in root.glob("model/*/.*.partial/checkpoint-*/complete.json")}


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)

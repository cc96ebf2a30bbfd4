"""Project roots that are damaged and mended: the reference run and its saved copies, the driver, what is compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_korean.paths import DRIVER_STAGES as STAGES

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = REPOSITORY / "run_full_pipeline.sh"
INSIDE = Path(__file__).resolve().parent / "inside"
TRAININGS = ("train_00", "train_01", "train_02")
OPTIONS = ("--max-samples", "12")  # with the profile of inside/sitecustomize.py about ten steps a training
PATIENCE = 600.0  # seconds for one run of the driver, which takes one or two minutes
POLL = 0.02  # seconds


stopping = threading.Event()  # the series ends: nothing new is begun


# the driver ---------------------------------------------------------------------------------------------


def environment(root: Path, control: Path, **more: str) -> dict[str, str]:
    """One thread, whatever the machine: the reference is compared byte by byte."""
    inside = os.pathsep.join([str(INSIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": inside, "CHAOS": str(control)}
    return {**os.environ, **fixed, "MEDGEMMA_KOREAN_ROOT": str(root), **more}


def fresh_control(control: Path) -> None:
    shutil.rmtree(control, ignore_errors=True)
    control.mkdir(parents=True)


@dataclass
class Attempt:
    """One run of a command on a root, begun; its output goes to a file."""

    process: subprocess.Popen
    output: Path
    control: Path

    @classmethod
    def begin(cls, command: list[str], root: Path, control: Path, output: Path, **more: str) -> Attempt:
        if stopping.is_set():
            raise KeyboardInterrupt
        fresh_control(control)
        with open(output, "wb") as file:
            process = subprocess.Popen(
                command,
                env=environment(root, control, **more),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_hear_signals,
            )
        return cls(process, output, control)

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def entered(self, stage: str) -> bool:
        return f"\n== {stage}\n" in self.text

    def due(self, stage: str) -> bool:
        return (self.control / f"due_{stage}").exists()

    def let_go(self, stage: str) -> None:
        """The stage that stands still at its moment goes on."""
        (self.control / f"done_{stage}").touch()

    def stage_pid(self) -> int | None:
        """The stage's own process, which the driver has put into a session of its own."""
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                if os.getsid(pid) == pid and b"/script/" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def wait(self) -> int:
        """The exit code. Raises TimeoutExpired after PATIENCE."""
        return self.process.wait(PATIENCE)


def _hear_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def processes_of(control: Path) -> list[int]:
    """Every process of a chaos run, also those whose parents are gone."""
    mark, found = f"CHAOS={control}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                values = (folder / "environ").read_bytes().split(b"\0")
                of_it = any(value == mark or value.startswith(mark + b"/") for value in values)
                if of_it and int(folder.name) != os.getpid() and _is_alive(folder):
                    found.append(int(folder.name))
    return found


def _is_alive(process: Path) -> bool:
    return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


def kill_all(control: Path) -> None:
    for pid in processes_of(control):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# the reference ------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """An uninterrupted run, with a copy of its root as each stage began.

    seconds: of each stage. changes: how many times each stage changes a file.
    """

    folder: Path
    seconds: dict[str, float]
    changes: dict[str, int]

    def copy_after(self, number: int) -> Path:
        """The root as it was when the first `number` stages were complete."""
        return self.folder / f"after_{number}"


def code_digest() -> str:
    """Of everything that makes the artefacts: another reference where it differs."""
    digest = hashlib.sha256()
    sample = (p for p in (REPOSITORY / "data" / "sample").rglob("*.*") if "02_refined" not in p.parts)
    code = (p for p in (REPOSITORY / "script").rglob("*") if p.suffix in (".py", ".json", ".md", ".html", ".css"))
    for file in sorted([DRIVER, INSIDE / "sitecustomize.py", *code, *(p for p in sample if ".stages" not in p.parts)]):
        if file.is_file():
            digest.update(str(file.relative_to(REPOSITORY)).encode() + file.read_bytes())
    return digest.hexdigest()


def new_root(root: Path) -> None:
    hidden = shutil.ignore_patterns(".stages", "02_refined")
    shutil.copytree(REPOSITORY / "data" / "sample", root / "data" / "sample", ignore=hidden)


def make_reference(work: Path) -> Reference:
    """The reference in `work`: the one that is there, where it was made by this code."""
    folder, about = work / "reference", work / "reference" / "reference.json"
    code = code_digest()
    if about.is_file():
        known = json.loads(about.read_text())
        if known["code"] == code:
            return Reference(folder, known["seconds"], known["changes"])
    shutil.rmtree(folder, ignore_errors=True)
    root, control = folder / "root", work / "reference_control"
    new_root(root)
    command = [str(DRIVER), *OPTIONS]
    attempt = Attempt.begin(command, root, control, work / "reference.txt", CHAOS_AT="* 1")
    try:
        seconds = _copied_at_each_stage(attempt, root, folder)
    finally:
        kill_all(control)
    shutil.copytree(root, folder / f"after_{len(STAGES)}")
    changes = {stage: (control / f"changes_{stage}").stat().st_size for stage in STAGES}
    about.write_text(json.dumps({"code": code, "seconds": seconds, "changes": changes}, indent=1))
    return Reference(folder, seconds, changes)


def _copied_at_each_stage(attempt: Attempt, root: Path, folder: Path) -> dict[str, float]:
    """Copy the root as each stage begins; the seconds of each. Raises RuntimeError when the run fails."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    for number, stage in enumerate(STAGES):
        while attempt.running and not attempt.due(stage):
            if stage not in began and attempt.entered(stage):
                began[stage] = time.monotonic()
                ended[STAGES[number - 1]] = began[stage]
            time.sleep(POLL)
        copying = time.monotonic()
        shutil.copytree(root, folder / f"after_{number}")
        attempt.let_go(stage)
        began[stage] = began.get(stage, copying) + time.monotonic() - copying
    code = attempt.wait()
    ended[STAGES[-1]] = time.monotonic()
    if code:
        raise RuntimeError(f"the uninterrupted run ended with {code}:\n{attempt.text[-3000:]}")
    return {stage: ended[stage] - began[stage] for stage in STAGES}


# what is compared ---------------------------------------------------------------------------------------

# Times, trainer state and logs are not compared; nor what is kept aside, nor pictures, which the page's numbers make.
_NOT_COMPARED = ("runs",)
_NOT_COMPARED_STARTS = ("checkpoint-", "rejected-checkpoint-")
_OF_TIME = ("seconds", "finished", "versions", "mtime_ns", "time", "seal", "peak_memory", "resumed")
# Of the report what is compared by content: it holds times.
_TIMED = ("summary.json", "test_looks.json", "contamination-dev.json", "contamination-test.json")


def _compared(parts: tuple[str, ...]) -> bool:
    return not any(
        ".previous" in part or part in _NOT_COMPARED or part.startswith(_NOT_COMPARED_STARTS) for part in parts
    )


def without_times(value: Any) -> Any:
    """A record with what is compared alone: no times, and of its files those that are compared."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in _OF_TIME and _compared(Path(k).parts or (k,))}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def artefacts(root: Path) -> dict[str, Any]:
    """Relative path -> content: a hash, a record without its times, or "there" for a page and its pictures."""
    found: dict[str, Any] = {}
    for top in ("data", "model"):
        for file in sorted((root / top).rglob("*")):
            name = file.relative_to(root)
            if not file.is_file() or not _compared(name.parts):
                continue
            if "report" in name.parts and file.suffix in (".html", ".png"):
                found[str(name)] = "there"
            elif file.name == "stage.json" or ".stages" in name.parts:
                found[str(name)] = _record(file)
            elif file.name in _TIMED:
                found[str(name)] = without_times(json.loads(file.read_text()))
            else:
                found[str(name)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _record(file: Path) -> Any:
    record = json.loads(file.read_text())
    of_file = {k: v.get("sha256") for k, v in record.get("outputs", {}).items() if _compared(Path(k).parts)}
    return {**without_times(record), "outputs": without_hash_of_records(of_file)}


def without_hash_of_records(hashes: dict[str, str]) -> dict[str, str]:
    """Without the hashes of what holds times: records, the report's page and what it cites, pictures of it."""
    times = ("stage.json", *_TIMED, ".html", ".png")
    return {name: digest for name, digest in hashes.items() if not name.endswith(times)}


def differences(root: Path, expected: Path) -> list[str]:
    """What of a root is not as in another one, one line each."""
    have, want = artefacts(root), artefacts(expected)
    found = [f"{name} is missing" for name in want if name not in have]
    found += [f"{name} is left over" for name in have if name not in want]
    for name in sorted(have.keys() & want.keys()):
        if have[name] != want[name]:
            what = _leaves(have[name], want[name]) if isinstance(want[name], dict) else ""
            found.append(f"{name} differs{f': {what}' if what else ''}")
    return found


def _leaves(have: Any, want: Any, prefix: str = "") -> str:
    if isinstance(have, dict) and isinstance(want, dict):
        parts = (_leaves(have.get(k), want.get(k), f"{prefix}.{k}") for k in sorted({*have, *want}))
        return "; ".join(filter(None, parts))
    return "" if have == want else f"{prefix[1:]} {str(have)[:80]} instead of {str(want)[:80]}"


# disks --------------------------------------------------------------------------------------------------


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs (root outside of a container that forbids it)."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    probe = folder / "probe"
    probe.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", probe], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", probe], check=True)
        return done.returncode == 0
    finally:
        probe.rmdir()


def mounts_below(folder: Path) -> list[str]:
    """Mount points below a folder, the innermost first."""
    found = [line.split()[4].replace("\\040", " ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((m for m in found if m.startswith(f"{folder.resolve()}/")), key=len, reverse=True)


def unmount_below(folder: Path) -> None:
    for place in mounts_below(folder):
        subprocess.run(["umount", "-l", place], capture_output=True)


@contextlib.contextmanager
def root_from(copy: Path, home: Path, tmpfs: bool) -> Iterator[Path]:
    """A root to damage, a copy of a saved one; on a disk of its own where tmpfs."""
    unmount_below(home)
    shutil.rmtree(home, ignore_errors=True)
    root = home / "root"
    root.mkdir(parents=True)
    if tmpfs:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", root], check=True)
    try:
        shutil.copytree(copy, root, dirs_exist_ok=True)
        yield root
    finally:
        kill_all(home / "control")
        unmount_below(home)

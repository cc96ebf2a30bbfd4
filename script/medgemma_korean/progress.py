"""How a run is going: `logs/progress_<name>.txt`, for people, and `logs/metrics_<name>.jsonl`, one event a line.

The text file is rewritten atomically from a small JSON state beside it. Further down: who drives a run, and
where the stages of a run leave their records and whether those still fit together (`--status`, `--plan`, `--verify`).
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medgemma_korean import cli, processes, records
from medgemma_korean.paths import DRIVER_STAGES, RunPaths, show

_STAGE_OF = {
    "download": "download",
    "refine": "refine",
    "build": "download",
    "prepare": "prepare_tokenizer",
    "add": "add_lora",
    "report": "report",
}

# Of logs/metrics_<name>.jsonl: an event is about 250 bytes, so that three files hold a month at one every ten seconds.
METRICS_BYTES, METRICS_FILES = 20_000_000, 3


def stage_of(program: str) -> str:
    """The driver's stage that a program belongs to."""
    if program.startswith("train_0"):
        return program[:8]
    return _STAGE_OF.get(program.split("_")[0], program)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pid(value: Any) -> bool:
    return isinstance(value, int)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e20  # which is no NaN, and can be printed


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1e11  # seconds; later ones are no date of Python's


def _is_first(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(key)) for key in ("done", "total", "time"))


ENTRY = {"state": _is_text, "program": _is_text, "changed": _is_time, "pid": _is_pid}  # of a stage, always
# Or null, or not there.
MORE = {"percent": _is_number, "eta": _is_number, "rate": _is_number, "since": _is_time, "first": _is_first}
MORE |= {"metric": _is_text, "cause": _is_text, "advice": _is_text}
# Of the driver's last start.
RUNNING, ENDED = {"pid": _is_pid, "since": _is_time}, {"ended": _is_time, "message": _is_text}
HOLDER = {"pid": _is_pid, "since": _is_time, "host": _is_text}


def _is_state(state: Any) -> bool:
    """Whether this is what `update` writes; a full disk or a hand may have left something else."""
    if not isinstance(state, dict) or not isinstance(state.get("name"), str):
        return False
    stages, run = state.get("stages"), state.get("run", {})
    if not isinstance(stages, dict) or not isinstance(run, dict):
        return False
    needs = {} if "outcome" not in run else RUNNING if run["outcome"] == "running" else ENDED | {"outcome": _is_text}
    return all(holds(run.get(key)) for key, holds in needs.items()) and all(
        isinstance(entry, dict)
        and all(holds(entry.get(key)) for key, holds in ENTRY.items())
        and all(entry.get(key) is None or holds(entry[key]) for key, holds in MORE.items())
        for entry in stages.values()
    )


def read_state(paths: RunPaths) -> dict[str, Any]:
    """The progress state; an empty one where nothing has run or the file is damaged."""
    with contextlib.suppress(records.PipelineError):
        state = records.read_json(paths.progress_state)
        if _is_state(state):
            return state
    return {"name": paths.name, "stages": {}}


@contextlib.contextmanager
def changing(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """The progress state, to be changed inside and then written and drawn.

    The driver and a stage's program may both have something to say: one at a time, so that neither undoes the other's.
    """
    with _alone(paths) as lock:
        whole = read_state(paths)
        yield whole
        try:
            _write(paths, whole)
        except OSError as error:
            if lock < 0 or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.truncate(lock, 0)  # why a run ended must find room on the disk that it filled
            _write(paths, whole)


def _write(paths: RunPaths, whole: dict[str, Any]) -> None:
    records.write_json(paths.progress_state, whole)
    draw(paths, whole)


def draw(paths: RunPaths, whole: dict[str, Any] | None = None) -> None:
    """Write the progress file anew."""
    records.write_text(paths.progress, render(whole or read_state(paths)))


RESERVE = 64 << 10  # bytes of disk that the lock file keeps for the last words of a run
LOCK_PATIENCE = 5.0  # seconds; a writer takes milliseconds, unless it was stopped (SIGSTOP) in the middle


@contextlib.contextmanager
def _alone(paths: RunPaths) -> Iterator[int]:
    """A descriptor of the state's lock file; -1, and no protection, where the disk knows no locks."""
    paths.progress_lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(paths.progress_lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # of another user, or on a full disk
        yield -1
        return
    try:
        _lock(file)
        if os.fstat(file).st_size < RESERVE:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file, 0, RESERVE)
        yield file
    finally:
        os.close(file)


def _lock(file: int) -> None:
    """Take the lock of an open file, until it is closed; without it after LOCK_PATIENCE, or on a disk without locks."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return None
    return None


def update(
    paths: RunPaths,
    program: str,
    driver_stage: str | None = None,
    *,
    state: str,
    done: int | None = None,
    total: int | None = None,
    percent: float | None = None,
    metric: str | None = None,
    cause: str | None = None,
    advice: str | None = None,
) -> None:
    """Record a program's state (waiting, running, complete, skipped, interrupted, failed, gate) and redraw.

    done of total: rows, steps or bytes. cause, advice: why a stage did not end well, and what to do.
    """
    if not processes.is_main():
        return
    stage = driver_stage or stage_of(program)
    with changing(paths) as whole:
        if state == "complete" and os.environ.get(cli.DRIVER_VARIABLE) == stage:
            # One program of the driver's stage is done, and another may follow; the driver knows when all are.
            state = "running"
            whole["stages"].get(stage, {}).pop("percent", None)
            percent = None
        now = time.time()
        entry = whole["stages"].get(stage, {})
        if entry.get("program") != program:
            entry.pop("metric", None)  # it was the other program's
        # A killed process leaves "running" behind; the next one starts its own clock.
        same = (entry.get("state"), entry.get("program"), entry.get("pid")) == ("running", program, os.getpid())
        if "since" not in entry or (state == "running" and not same):
            entry |= {"since": now, "first": None, "rate": None, "eta": None}
        if state != entry.get("state"):
            entry.pop("cause", None)
            entry.pop("advice", None)
        entry |= {"state": state, "program": program, "changed": now, **process(os.getpid())}
        if done is not None and total:
            percent = 100.0 * done / total
            _pace(entry, done, total, now)
        if state != "running":
            entry["eta"] = entry["rate"] = None
            entry["seconds"] = round(now - entry["since"], 1)
        if percent is not None or state == "complete":
            entry["percent"] = 100.0 if state == "complete" else round(percent, 1)
        given = {"metric": metric, "cause": cause, "advice": advice}
        entry |= {key: value for key, value in given.items() if value is not None}
        whole["stages"][stage] = entry


def _pace(entry: dict[str, Any], done: int, total: int, now: float) -> None:
    """Set the rate (a second) and the seconds left.

    A resumed training begins in the middle, so from the second call on the first one is what is counted from.
    """
    first = entry.get("first")
    if first is None or first["total"] != total or first["done"] > done:
        entry["first"] = {"done": done, "total": total, "time": now}
        before, since = 0, entry["since"]
    else:
        before, since = first["done"], first["time"]
    if done > before:
        entry["rate"] = (done - before) / max(now - since, 1e-3)
        entry["eta"] = (total - done) / entry["rate"]
    elif done == 0:
        entry["rate"] = entry["eta"] = None


def fail(
    paths: RunPaths, program: str, stage: str | None, *, state: str, cause: str, advice: str, everywhere: bool
) -> None:
    """Record why a program ends, in words; unless `everywhere`, only where this process has set the state already."""
    stage = stage or stage_of(program)
    entry = read_state(paths)["stages"].get(stage, {})
    if everywhere or (entry.get("state"), entry.get("pid")) == (state, os.getpid()):
        known = entry.get("program", stage)  # the driver, which began the stage, knows no program
        update(paths, program if known == stage else known, stage, state=state, cause=cause, advice=advice)


def event(paths: RunPaths, program: str, **values: Any) -> None:
    """Append one event to `logs/metrics_<name>.jsonl`, a whole line or none; the file is cut over by size.

    Raises OSError where the disk is full.
    """
    if not processes.is_main():
        return
    paths.metrics.parent.mkdir(parents=True, exist_ok=True)
    values = {key: cli.masked(value) if isinstance(value, str) else value for key, value in values.items()}
    line = records.dump({"time": round(time.time(), 3), "program": program, **values}) + "\n"
    cli.roll(paths.metrics, METRICS_BYTES, METRICS_FILES)
    _append(paths.metrics, line.encode())


def _append(path: Path, line: bytes) -> None:
    """Append in one write, undone where the disk took a part.

    Under a lock: the size of a file grows page by page, and another's write would look like a line cut off.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(file)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # of a writer that was killed
            line = b"\n" + line
        written = os.write(file, line)
        if written < len(line):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def rate_text(rate: float) -> str:
    """A rate a second for people: `12.3/s`, `4.0/min`, `8.5M/s`."""
    unit = "s"
    for longer in ("min", "h"):
        if rate < 1:
            rate, unit = rate * 60, longer
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= factor:
            return f"{rate / factor:.1f}{letter}/{unit}"
    return f"{rate:.1f}/{unit}"


def moment(seconds: float) -> str:
    """A time of day with its date."""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


QUIET = 600.0  # seconds without a change after which a stage that runs is mentioned


def render(state: dict[str, Any], quietness: bool = True) -> str:
    """The progress file's text: a line a stage, and below them what needs words; `quietness` among it."""
    lines = [f"run {state['name']}, written {moment(time.time())}", run_line(state.get("run"))]
    lines.append(f"{'stage':18}{'state':13}{'percent':>7}  {'left':>10}  {'rate':>9}  {'changed':19}  last")
    below = []
    for stage in DRIVER_STAGES:
        entry = state["stages"].get(stage)
        if entry is None:
            lines.append(f"{stage:18}waiting")
            continue
        percent = f"{entry['percent']:.0f} %" if entry.get("percent") is not None else ""
        left = duration(entry["eta"]) if entry.get("eta") else ""
        rate = rate_text(entry["rate"]) if entry.get("rate") else ""
        last = entry.get("metric") or ""
        if entry["state"] in ("running", "failed", "interrupted") and entry.get("program"):
            last = f"{entry['program']}: {last}" if last else entry["program"]
        columns = f"{percent:>7}  {left:>10}  {rate:>9}  {moment(entry['changed'])}"
        lines.append(f"{stage:18}{entry['state']:13}{columns}  {last}".rstrip())
        if quietness and entry["state"] == "running" and (text := quiet(entry)):
            below.append(f"{stage}: {text}")
        if entry.get("cause"):
            below += [f"{entry['program']}: {entry['cause']}", *filter(None, [entry.get("advice")])]
    return "\n".join([*lines, *([""] if below else []), *below]) + "\n"


def run_line(run: dict[str, Any] | None) -> str:
    """What became of the last start of the driver, as far as it could say; empty where there was none."""
    if not run or "outcome" not in run:  # its beginning was in a state that has been damaged since
        return ""
    if run["outcome"] == "running":
        return f"driver: pid {run['pid']}, since {moment(run['since'])}; it writes this file at least once a minute"
    return f"last run: {run['outcome']}, {moment(run['ended'])}: {run['message']}"


def quiet(entry: dict[str, Any], heard: float = 0.0) -> str:
    """Words for a stage that runs and has not been heard of for long, or cannot be; empty where all is well.

    heard: when something else than the progress state, the log for instance, changed last.
    """
    seconds = time.time() - max(entry["changed"], heard)
    if not is_at_work(entry):
        return f"no sign of life for {duration(seconds)}, process {entry['pid']} is gone"
    return f"no sign of life for {duration(seconds)}, process {entry['pid']} is alive" if seconds > QUIET else ""


# the driver ---------------------------------------------------------------------------------------------


def lock_file(paths: RunPaths) -> Path:
    """What the driver holds an flock on. Its stages inherit the lock, so that an orphan still counts as a run."""
    return paths.pid.with_suffix(".lock")


def started(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None where there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19]) if fields[0] not in "ZX" else None  # field 22 of proc(5), counted behind the name


def is_alive(pid: int) -> bool:
    return started(pid) is not None


def boot() -> str:
    """The id that the machine drew when it was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process(pid: int) -> dict[str, Any]:
    """What tells a process from any other, of this boot or another one."""
    return {"pid": pid, "started_ticks": started(pid), "boot_id": boot()}


def is_at_work(entry: dict[str, Any]) -> bool:
    """Whether the process that an entry names (`process`) is alive; another one may have its pid by now."""
    return entry.get("started_ticks") is not None and process(entry["pid"]).items() <= entry.items()


def take(paths: RunPaths, pid: int, command: str) -> None:
    """Write down that process `pid` drives the run: the number for people, and what tells it from its successors."""
    since = {"since": round(time.time(), 3), "host": socket.gethostname(), "command": command}
    records.write_json(paths.holder, process(pid) | since)
    records.write_text(paths.pid, f"{pid}\n")


def release(paths: RunPaths, pid: int | None = None) -> bool:
    """What the driver wrote when it began is gone; False, and nothing is, where it was not written by `pid`."""
    held = holder_of(paths)
    if pid is not None and held and held["pid"] != pid:
        return False
    paths.pid.unlink(missing_ok=True)
    paths.holder.unlink(missing_ok=True)
    return True


def holder_of(paths: RunPaths) -> dict[str, Any] | None:
    """Who drives the run, or drove it and could not say that it ended; None where nobody did."""
    with contextlib.suppress(records.PipelineError):
        held = records.read_json(paths.holder)
        if isinstance(held, dict) and {"started_ticks", "boot_id"} <= held.keys():
            if all(holds(held.get(key)) for key, holds in HOLDER.items()):
                return held
    return None


def is_elsewhere(held: dict[str, Any]) -> bool:
    """Whether a holder is of another machine or container that shares this disk, and cannot be seen from here."""
    return held["host"] != socket.gethostname() and not is_at_work(held)


def why_gone(held: dict[str, Any]) -> str:
    """Why a holder drives no more; empty for one that does."""
    if is_at_work(held):
        return ""
    if is_elsewhere(held):
        return f"it runs, or ran, on {held['host']}, which cannot be seen from here"
    return "its process was killed" if held["boot_id"] == boot() else "its machine was started anew"


def driver_of(paths: RunPaths) -> int | None:
    """The pid of the run's living driver, or None.

    A pid is used again by other processes, so the number alone says nothing: boot and start time must agree too.
    """
    held = holder_of(paths)
    return held["pid"] if held and is_at_work(held) else None


def is_driver(pid: int) -> bool:
    """Whether a process is a run_full_pipeline.sh, of whichever run."""
    try:
        return b"run_full_pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def finish(paths: RunPaths, outcome: str, stage: str, message: str, pid: int | None = None) -> None:
    """The driver has ended, or will in a moment: nobody holds the run, and its outcome stands in the state.

    pid: the driver's. Nothing is changed where another one has the run by now.
    """
    if not release(paths, pid):
        return
    with changing(paths) as whole:
        last = {"outcome": outcome, "ended": time.time(), "stage": stage, "message": message}
        whole["run"] = whole.get("run", {}) | last


def lock_holders(paths: RunPaths) -> list[int]:
    """The processes that have the run's lock file open: the driver, its stage, or what a killed driver left."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if _has_open(int(folder.name), lock_file(paths)):
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended, or is another user's
    return sorted(found)


def _has_open(pid: int, file: Path) -> bool:
    """Raises PermissionError for another user's process."""
    try:
        wanted = file.stat()
    except FileNotFoundError:
        return False
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


# the records of a run -----------------------------------------------------------------------------------


def records_of(paths: RunPaths, built: bool, skip_01: bool = False) -> dict[str, dict[str, Path]]:
    """Driver's stage -> program -> where its record lies. `built`: the raw model is built, not fetched."""
    download = ["download_02_kor_med_test", "download_00_plain_text"]
    refine = ["refine_00_plain_text", "refine_02_kor_med_test"]
    if not skip_01:
        download = ["download_01_medical_dict", "download_01_english_korean", *download]
        refine[1:1] = ["refine_01_medical_dict", "refine_01_english_korean"]
    raw_model = "build_tiny_model" if built else "download_model"
    models = {
        "prepare_tokenizer": paths.tokenizer,
        "add_lora": paths.raw_lora_added,
        "train_00": paths.trained_00,
        "train_01": paths.trained_01,
        "add_lora_second": paths.another_lora_added,
        "train_02": paths.trained_02,
    }
    return {
        "download": {program: paths.record(program) for program in download}
        | {raw_model: paths.raw_model / "stage.json"},
        "refine": {program: paths.record(program) for program in refine},
        **{stage: {stage: folder / "stage.json"} for stage, folder in models.items()},
    }


def changed_inputs(record_path: Path, paths: RunPaths, thorough: bool = False) -> list[str]:
    """What a complete stage read that is something else by now, one line each.

    An input that a stage made is compared by that stage's fingerprint, a raw one by content; not thorough, a raw
    file whose size and time are unchanged counts as unchanged.
    """
    from medgemma_korean import base_model  # which imports this module
    from medgemma_korean.stage import read_record

    record = read_record(record_path)
    home = record_path.parent / record["home"]
    found = []
    plain = record.get("base_files")
    for role, then in record["identity"]["inputs"].items():
        if plain and role.startswith(f"{base_model.ROLE} "):
            continue  # with its base, below
        path = Path(os.path.normpath(home / record["inputs"][role]))
        if path.is_relative_to(paths.models) or path.parent == paths.refined or (path / "stage.json").is_file():
            maker = maker_of(path)
            now = maker["fingerprint"] if maker else None
            gap = "is incomplete" if path.exists() else "is gone"
        else:
            known = {} if thorough else record["raw_files"]
            now, gap = _content_of(path, home, known), "is gone"
        if now != then:
            why = "was not there" if then is None else gap if now is None else "is another one by now"
            found.append(f"input {role} ({show(path)}) {why}")
    if plain:
        folder = Path(os.path.normpath(record_path.parent / record["base_folder"]))
        found += [f"its base: {text}" for text in base_model.changed(folder, plain, thorough)]
    elif "base_folder" in record:
        base = maker_of(Path(os.path.normpath(record_path.parent / record["base_folder"])).parent)
        if base is None or base["fingerprint"] != record["base_fingerprint"]:
            found.append("its base is another one by now" if base else "its base is gone")
    return found


def maker_of(path: Path) -> dict[str, Any] | None:
    """The record of the stage that made a model folder or a refined file or folder."""
    from medgemma_korean.stage import read_record

    if (path / "stage.json").is_file():
        return read_record(path / "stage.json")
    for file in sorted((path.parent / ".stages").glob("refine_*.json")):
        record = read_record(file)
        made = (Path(os.path.normpath(file.parent / record["home"] / output)) for output in record["outputs"])
        if any(output.is_relative_to(path) for output in made):
            return record
    return None


def _content_of(path: Path, home: Path, known: dict[str, dict[str, Any]]) -> str | None:
    """A raw input's content as `stage` fingerprints it; None where there is none."""
    from medgemma_korean.stage import files_under  # `stage` imports this module

    if not path.exists():
        return None
    base = path if path.is_dir() else path.parent
    hashes = {}
    for file in files_under(path):
        entry, stat = known.get(os.path.relpath(file, home)), file.stat()
        same = entry and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        hashes[str(file.relative_to(base))] = entry["sha256"] if same else records.sha256_once(file)
    return records.digest_of(hashes)

"""How a run is going: `logs/progress_<name>.txt`, for people, and `logs/metrics_<name>.jsonl`, one event a line.

The text file is rewritten atomically from a small JSON state beside it. Further down: whether a driver is alive, and
where the stages of a run leave their records and whether those still fit together (`--status`, `--plan`, `--verify`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from pathlib import Path
from typing import Any

from medgemma_korean import processes, records
from medgemma_korean.paths import DRIVER_STAGES, RunPaths, show

_STAGE_OF = {
    "download": "download",
    "refine": "refine",
    "build": "download",
    "prepare": "prepare_tokenizer",
    "add": "add_lora",
    "report": "report",
}

# The stage that the driver runs a program for, in that program's environment.
DRIVER_VARIABLE = "MEDGEMMA_KOREAN_STAGE"


def stage_of(program: str) -> str:
    """The driver's stage that a program belongs to."""
    if program.startswith("train_0"):
        return program[:8]
    return _STAGE_OF.get(program.split("_")[0], program)


NUMBER = (int, float)
ENTRY = {"state": str, "program": str, "changed": NUMBER, "pid": int}  # of a stage, always
MORE = {"percent": NUMBER, "eta": NUMBER, "metric": str}  # or null, or not there


def _is_state(state: Any) -> bool:
    """Whether this is what `update` writes; a full disk or a hand may have left something else."""
    if not isinstance(state, dict) or not isinstance(state.get("name"), str):
        return False
    stages = state.get("stages")
    return isinstance(stages, dict) and all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in ENTRY.items())
        and all(entry.get(key) is None or isinstance(entry[key], kind) for key, kind in MORE.items())
        for entry in stages.values()
    )


def read_state(paths: RunPaths) -> dict[str, Any]:
    """The progress state; an empty one where nothing has run or the file is damaged."""
    with contextlib.suppress(records.PipelineError):
        state = records.read_json(paths.progress_state)
        if _is_state(state):
            return state
    return {"name": paths.name, "stages": {}}


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
) -> None:
    """Record a program's state (waiting, running, complete, skipped, interrupted, failed, gate) and redraw."""
    if not processes.is_main():
        return
    whole = read_state(paths)
    stage = driver_stage or stage_of(program)
    if state == "complete" and os.environ.get(DRIVER_VARIABLE) == stage:
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
        entry["since"] = now
    entry |= {"state": state, "program": program, "changed": now, "pid": os.getpid()}
    if done is not None and total:
        percent = 100.0 * done / total
        entry["rate"] = done / max(now - entry["since"], 1e-3)
        entry["eta"] = (total - done) / entry["rate"] if entry["rate"] > 0 else None
    if state != "running":
        entry["eta"] = None
        entry["seconds"] = round(now - entry["since"], 1)
    if percent is not None or state == "complete":
        entry["percent"] = 100.0 if state == "complete" else round(percent, 1)
    if metric is not None:
        entry["metric"] = metric
    whole["stages"][stage] = entry
    records.write_json(paths.progress_state, whole)
    records.write_text(paths.progress, render(whole))


def event(paths: RunPaths, program: str, **values: Any) -> None:
    """Append one event to `logs/metrics_<name>.jsonl`."""
    if not processes.is_main():
        return
    paths.metrics.parent.mkdir(parents=True, exist_ok=True)
    line = records.dump({"time": round(time.time(), 3), "program": program, **values})
    with open(paths.metrics, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def render(state: dict[str, Any]) -> str:
    """The progress file's text: a line a stage."""
    lines = [f"run {state['name']}, written {datetime.datetime.now():%Y-%m-%d %H:%M:%S}", ""]
    lines.append(f"{'stage':18}{'state':13}{'percent':>8}  {'left':>10}  {'changed':19}  last")
    for stage in DRIVER_STAGES:
        entry = state["stages"].get(stage)
        if entry is None:
            lines.append(f"{stage:18}{'waiting':13}")
            continue
        percent = f"{entry['percent']:.0f} %" if entry.get("percent") is not None else ""
        left = duration(entry["eta"]) if entry.get("eta") else ""
        changed = datetime.datetime.fromtimestamp(entry["changed"]).strftime("%Y-%m-%d %H:%M:%S")
        last = entry.get("metric") or ""
        if entry["state"] in ("running", "failed", "interrupted") and entry.get("program"):
            last = f"{entry['program']}: {last}" if last else entry["program"]
        lines.append(f"{stage:18}{entry['state']:13}{percent:>8}  {left:>10}  {changed:19}  {last}".rstrip())
    return "\n".join(lines) + "\n"


# the driver ---------------------------------------------------------------------------------------------


def lock_file(paths: RunPaths) -> Path:
    """What the driver holds an flock on. Its stages inherit the lock, so that an orphan still counts as a run."""
    return paths.pid.with_suffix(".lock")


def is_alive(pid: int) -> bool:
    """True for a process that exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def driver_of(paths: RunPaths) -> int | None:
    """The pid of the run's living driver, or None.

    A pid is used again by other processes, so the number in the pid file alone says nothing: the process must
    be a run_full_pipeline and have this run's lock file open. (Start times would do until a clock is set.)
    """
    try:
        pid = int(paths.pid.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    if b"run_full_pipeline" not in command or not is_alive(pid):
        return None
    try:
        return pid if _has_open(pid, lock_file(paths)) else None
    except PermissionError:  # another user's driver
        return pid


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

    record = records.read_json(record_path)
    home = record_path.parent / record["home"]
    found = []
    plain = record.get("base_files")
    for role, then in record["identity"]["inputs"].items():
        if plain and role.startswith(f"{base_model.ROLE} "):
            continue  # with its base, below
        path = Path(os.path.normpath(home / record["inputs"][role]))
        if path.is_relative_to(paths.models) or path.parent == paths.refined or (path / "stage.json").is_file():
            maker = _maker_of(path)
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
        base = _maker_of(Path(os.path.normpath(record_path.parent / record["base_folder"])).parent)
        if base is None or base["fingerprint"] != record["base_fingerprint"]:
            found.append("its base is another one by now" if base else "its base is gone")
    return found


AWAY = "it is no stage record; move it away"


def _maker_of(path: Path) -> dict[str, Any] | None:
    """The record of the stage that made a model folder or a refined file or folder."""
    if (path / "stage.json").is_file():
        return records.read_object(path / "stage.json", "fingerprint", repair=AWAY)
    for file in sorted((path.parent / ".stages").glob("refine_*.json")):
        record = records.read_object(file, "home", "outputs", "fingerprint", repair=AWAY)
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
        hashes[str(file.relative_to(base))] = entry["sha256"] if same else records.sha256(file)
    return records.digest_of(hashes)

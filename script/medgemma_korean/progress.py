"""`logs/progress_<name>.txt`, for people, and `logs/metrics_<name>.jsonl`, one event a line, for programs.

The text file is rewritten atomically from a small JSON state beside it, which also tells `--status` the pid.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from typing import Any

from medgemma_korean import records
from medgemma_korean.paths import DRIVER_STAGES, RunPaths

_STAGE_OF = {
    "download": "download",
    "refine": "refine",
    "build": "download",
    "prepare": "prepare_tokenizer",
    "add": "add_lora",
    "report": "report",
}


def stage_of(program: str) -> str:
    """The driver's stage that a program belongs to."""
    if program.startswith("train_0"):
        return program[:8]
    return _STAGE_OF.get(program.split("_")[0], program)


def read_state(paths: RunPaths) -> dict[str, Any]:
    """The progress state; an empty one where nothing has run or the file is damaged."""
    with contextlib.suppress(records.PipelineError):
        state = records.read_json(paths.progress_state)
        if isinstance(state, dict) and isinstance(state.get("stages"), dict):
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
    whole = read_state(paths)
    stage = driver_stage or stage_of(program)
    now = time.time()
    entry = whole["stages"].get(stage, {})
    # A killed process leaves "running" behind; the next one starts its own clock.
    if entry.get("state") != "running" or entry.get("program") != program or entry.get("pid") != os.getpid():
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

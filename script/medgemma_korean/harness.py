"""The official KorMedMCQA protocol: lm-evaluation-harness used as a library, on the items of this project.

The harness is optional (`REQUIREMENT`) and imported inside functions. Its task files are taken as they are; only the
data set is replaced: `write_tasks` writes the items, and one small task file an exam that includes the harness's own
template. So its command line gives the same numbers from the same folder:

    lm_eval --model hf --model_args pretrained=<base>,peft=<adapter> --include_path <folder> --tasks kormedmcqa_doctor
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgemma_korean import cli, mcq, prompts, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show

REQUIREMENT = "lm_eval>=0.4.13"  # the first release whose task extracts an answer
TASK_VERSION = 3.0
NO_LETTER = "the official extraction finds no letter"
_TEMPLATE = ("tasks", "kormedmcqa", "_template_yaml")


def require() -> str:
    """The version of the harness. Raises PipelineError, naming the command, where it is absent or too old."""
    try:
        version = importlib.metadata.version("lm_eval")
        found = importlib.util.find_spec("lm_eval") is not None
    except importlib.metadata.PackageNotFoundError:
        version, found = "", False
    install = f"run: .venv/bin/pip install '{REQUIREMENT}'"
    if not found:
        raise PipelineError(f"--mode harness: lm-evaluation-harness is not installed; {install}")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (0, 4, 13):
        raise PipelineError(f"--mode harness: lm_eval {version} has an older protocol of KorMedMCQA; {install}")
    return version


def require_task() -> None:
    """Raise PipelineError unless the installed task is the version that this project knows, by its file."""
    file = _template()
    found = re.search(r"^\s+version:\s*([\d.]+)\s*$", file.read_text("utf-8") if file.is_file() else "", re.MULTILINE)
    if not found or float(found[1]) != TASK_VERSION:
        raise _other_version(found[1] if found else f"none in {show(file)}")


def _other_version(found: Any) -> PipelineError:
    return PipelineError(
        f"--mode harness: the harness has another version of the task ({found}); this project knows {TASK_VERSION}; "
        f"run: .venv/bin/pip install '{REQUIREMENT}'"
    )


def shots_of(paths: RunPaths) -> list[dict[str, Any]]:
    """The official shots, raw fewshot rows in their order; empty where the data have none."""
    from medgemma_korean.text.clean import normalise_line

    file = paths.raw_mcq / "fewshot.jsonl"
    return mcq.read_raw_items(file, normalise_line) if file.is_file() else []


def without_shots(
    items: Sequence[Mapping[str, Any]], fewshot: Sequence[Mapping[str, Any]], shots: int
) -> list[Mapping[str, Any]]:
    """The items that do not stand, solved, in their own prompt: dev holds the rows of fewshot.

    Raises PipelineError where an exam of the items has fewer rows of fewshot than `shots`.
    """
    exams = sorted({item["exam"] for item in items})
    shown = {(exam, mcq.item_key(shot)) for exam in exams for shot in _shots(fewshot, exam, shots)[:shots]}
    return [item for item in items if (item["exam"], mcq.item_key(item)) not in shown]


def _shots(fewshot: Sequence[Mapping[str, Any]], exam: str, shots: int) -> list[Mapping[str, Any]]:
    """The rows that an exam's shots are taken from, the first ones first."""
    own = [item for item in fewshot if item["exam"] == exam and len(prompts.letters_of(item)) == len(prompts.LETTERS)]
    if len(own) < shots:
        raise PipelineError(
            f"--shots {shots}: {exam} has {len(own)} rows of five options in fewshot.jsonl; give fewer, or fetch it "
            "with download_02_kor_med_test.py"
        )
    return own


def write_tasks(
    folder: Path, items: Sequence[Mapping[str, Any]], fewshot: Sequence[Mapping[str, Any]], shots: int
) -> list[str]:
    """Write the items and a task file for each of their exams; returns the tasks' names.

    Raises PipelineError for an item without five options, which the official prompt cannot show, and where an exam
    has fewer rows of fewshot than `shots`.
    """
    if lacking := [item["id"] for item in items if len(prompts.letters_of(item)) < len(prompts.LETTERS)]:
        raise PipelineError(
            f"--mode harness: the official prompt has five options; {len(lacking)} of the questions have fewer, first "
            f"{lacking[0]}; use --mode letter or generate, or other --exams"
        )
    own = {exam: _shots(fewshot, exam, shots) for exam in sorted({item["exam"] for item in items})}
    names = []
    for exam in own:
        name = re.sub(r"\W", "_", exam)
        files = {"test": folder / f"{name}-items.jsonl"}
        records.write_jsonl(files["test"], [_row(item) for item in items if item["exam"] == exam])
        if shots:
            files["fewshot"] = folder / f"{name}-fewshot.jsonl"
            records.write_jsonl(files["fewshot"], map(_row, own[exam]))
        names.append(f"kormedmcqa_{name}")
        records.write_text(folder / f"{names[-1]}.yaml", _task(names[-1], files))
    return names


def _row(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as the published data set has it: the answer is a number from 1."""
    shown = {key: item[key] for key in ("id", "exam", "question", *prompts.LETTERS)}
    return {**shown, "answer": prompts.LETTERS.index(item["answer"]) + 1}


def _template() -> Path:
    return Path(importlib.util.find_spec("lm_eval").origin).parent.joinpath(*_TEMPLATE)


def _task(name: str, files: Mapping[str, Path]) -> str:
    lines = [f"include: {json.dumps(str(_template()))}", f"task: {name}", "dataset_path: json", "dataset_name: null"]
    lines += ["dataset_kwargs:", "  data_files:"]
    lines += [f"    {split}: {json.dumps(str(file.resolve()), ensure_ascii=False)}" for split, file in files.items()]
    if "fewshot" not in files:
        lines += ["fewshot_split: null"]
    return "\n".join(lines) + "\n"


def wrapped(model: Any, tokenizer: Any, batch: int) -> Any:
    """The model as the harness takes it, its adapter included."""
    from lm_eval.models.huggingface import HFLM

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # It ties the weights of what it is given. Ours are tied, and PEFT's trained rows cannot be tied a second time.
    base.tie_weights = lambda *_, **__: None
    try:
        return HFLM(pretrained=base, tokenizer=tokenizer, batch_size=batch)
    finally:
        del base.tie_weights


def score(
    model: Any,
    tokenizer: Any,
    folder: Path,
    tasks: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    shots: int,
    batch: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answer the tasks of `write_tasks` by the official protocol.

    Returns the rows in the order of `items` (`mcq.score` takes them; "predicted" is the official extraction's letter)
    and what the harness itself reports: its version, the task's, exact_match by exam and over all items.
    Raises PipelineError when the installed task is another version than the one this project knows.
    """
    for library in ("lm_eval", "lm-eval", "evaluate", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # every row is here; nothing may wait for the hub
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    side = tokenizer.padding_side
    # Its progress bars belong to a terminal.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    log.info("%s by the official protocol, %s", cli.count(len(items), "question"), cli.count(shots, "shot"))
    try:
        with quiet:
            found = simple_evaluate(
                model=wrapped(model, tokenizer, batch),
                tasks=list(tasks),
                num_fewshot=shots,
                task_manager=TaskManager(include_path=str(folder)),
                bootstrap_iters=0,
                log_samples=True,
            )
    finally:
        tokenizer.padding_side = side
    versions = {name: found["versions"][name] for name in tasks}
    if wrong := {name: v for name, v in versions.items() if float(v) != TASK_VERSION}:
        raise _other_version(wrong)
    rows: dict[str, dict[str, Any]] = {}
    for sample in (sample for name in tasks for sample in found["samples"][name]):
        letter, doc = sample["filtered_resps"][0] or None, sample["doc"]
        rows[doc["id"]] = {
            "id": doc["id"],
            "exam": doc["exam"],
            "gold": prompts.LETTERS[doc["answer"] - 1],
            "predicted": letter,
            "reason": "official extraction" if letter else NO_LETTER,
            "output": sample["resps"][0][0],
        }
    exams = {name: found["results"][name]["exact_match,extract_answer"] for name in tasks}
    sizes = {name: len(found["samples"][name]) for name in tasks}
    official = {
        "lm_eval": require(),
        "task_version": TASK_VERSION,
        "shots": shots,
        "exact_match": exams,
        "micro": sum(exams[name] * sizes[name] for name in tasks) / sum(sizes.values()),
        "tasks": show(folder),
    }
    return [rows[item["id"]] for item in items], official

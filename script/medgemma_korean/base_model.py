"""A base that no stage of the run made: a folder of a Gemma 3 as anyone publishes it, or a hub id that is fetched.

    folder = of_hub(paths, "google/medgemma-4b-it")     # model/raw/google--medgemma-4b-it, or the run's own copy
    require_folder(folder)                              # at a glance: is it a Gemma 3 with tokenizer and weights
    require_whole(folder)                               # before it is trained on: every weight, and rows for every id

It has no stage record. What a stage reads of it is its configuration, tokenizer and weights; these are compared by
content, file by file. Nothing here writes into such a folder, except to fetch one. torch is imported inside functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_korean import checkpoints, hub, processes, profiles, records, sources
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.checkpoints import INDEX, SINGLE
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.sources import Source
from medgemma_korean.stage import RECORD_NAME, Input, Stage, changed_files, check_outputs, describe, read_record

FORMAT = 1  # of a fetched model folder
ROLE = "base model"  # the inputs of a stage are called "base model config.json" and so on
GEMMA_3 = ("gemma3", "gemma3_text")  # model_type of the multimodal and of the text-only one
WEIGHTS = (SINGLE, INDEX)
NEEDS = "Give a folder with the config.json, the tokenizer and all safetensors weights of an unquantised Gemma 3."
INFO = "base_info.json"  # beside a base that add_lora made
# As the hub wants its names; "--" is in none, so that it can stand for the "/".
_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
HUB_ID = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)


# a folder -----------------------------------------------------------------------------------------------


def weights(folder: Path) -> list[str]:
    """What is wrong with the weights of a folder: shards of the index that are missing, files that are cut."""
    shards = _shards(folder)
    present = {p.name for p in folder.glob("*.safetensors")}
    problems = [f"{name} is missing, and {INDEX} names it" for name in sorted(shards - present)]
    if not present:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        problems.append(f"no safetensors weights{f'; {pickled[0]} is pickled, and never loaded' if pickled else ''}")
    for name in sorted(present):
        file = folder / name
        with open(file, "rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            # The header ends the file's fixed part: u64 length, JSON with the offsets, then the numbers.
            whole = 0 < length <= file.stat().st_size - 8
            header = opened.read(length) if whole else b""
        if not whole or file.stat().st_size != 8 + length + _end_of_data(header):
            problems.append(f"{name} is no whole safetensors file")
    return problems


def _shards(folder: Path) -> set[str]:
    """The files that the index names. Raises PipelineError for what is no index."""
    if not (folder / INDEX).is_file():
        return set()
    try:
        return set(checkpoints.weight_map(folder).values())
    except (KeyError, TypeError, AttributeError):
        raise PipelineError(f"{show(folder / INDEX)}: not an index of weights; bring it anew") from None


def _end_of_data(header: bytes) -> int:
    try:
        entries = json.loads(header)
        return int(max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return -1


def missing(folder: Path) -> list[str]:
    """Everything that keeps a folder from being a whole model."""
    problems = [f"{name} is missing" for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    return problems + weights(folder)


def kind_problem(config_file: Path) -> str | None:
    """Why a config.json is not that of a Gemma 3 that can be trained on; None where it is."""
    config = records.read_json(config_file)
    if not isinstance(config, dict) or "model_type" not in config:
        return "its config.json is not that of a model"
    kind = config["model_type"]
    if kind not in GEMMA_3:
        return f"a model of the kind {kind}, not Gemma 3"
    if config.get("quantization_config"):
        return "its weights are quantised already; a base is given unquantised, and --precision quantises it"
    return None


def require_folder(folder: Path) -> None:
    """Raise PipelineError, with everything that is wrong, unless a folder can be a base. Loads nothing."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise PipelineError(
            f"{show(folder)}: holds an adapter alone; give its base, or the trained folder that it lies in"
        )
    problems = missing(folder)
    if (folder / "config.json").is_file() and (problem := kind_problem(folder / "config.json")):
        problems.insert(0, problem)
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file() and SINGLE not in _shards(folder):
        problems.append(f"{SINGLE} and {INDEX} are two sets of weights; take one of them away")
    if problems:
        raise PipelineError(f"{show(folder)} is no base to train on:\n  " + "\n  ".join(problems) + f"\n{NEEDS}")


def require_whole(folder: Path) -> None:
    """Raise PipelineError unless every weight is there in its shape, and the tokenizer has Gemma's turns and a row for
    each of its ids."""
    checkpoint = checkpoints.Checkpoint(folder)
    shapes = checkpoints.shapes_of(checkpoint.config)
    if wrong := [name for name, tensor in checkpoint if tensor.shape != shapes.get(name, tensor.shape)]:
        raise PipelineError(
            f"{show(folder)}: {len(wrong)} weights do not fit config.json, first {wrong[0]}; bring both anew"
        )
    records.read_json(folder / "tokenizer.json")
    tokenizer = tokenizers.load(folder)
    rows = shapes[checkpoints.MATRIX][0]
    if len(tokenizer) > rows:
        raise PipelineError(f"{show(folder)}: {len(tokenizer):,} token ids, but {rows:,} rows; bring its own tokenizer")
    turns = (tokenizers.START_OF_TURN, tokenizers.END_OF_TURN)
    lacks = [token for token in turns if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    lacks += [f"a {name} token" for name in ("bos", "eos", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    if tokenizer.chat_template is None:
        lacks.append("a chat template")
    if lacks:
        raise PipelineError(
            f"{show(folder)}: its tokenizer lacks {', '.join(lacks)}; an instruction-tuned Gemma 3 has it"
        )


def new_ids(folder: Path) -> list[int]:
    """The token rows that train with the first adapter: those that `base_info.json` names, else none."""
    return list(records.read_object(folder / INFO).get("new_ids", [])) if (folder / INFO).is_file() else []


# by content ---------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """Configuration, tokenizer and weights: what a training depends on, and nothing else of a folder."""
    shards = _shards(folder)
    names = ["config.json", INFO, *tokenizers.FILES, *((INDEX, *sorted(shards)) if shards else (SINGLE,))]
    return [folder / name for name in names if (folder / name).is_file()]


def inputs(folder: Path) -> list[Input]:
    """The files as inputs of a stage, each with its name, so that a difference says which one it is."""
    return [Input(f"{ROLE} {file.name}", file) for file in files(folder)]


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: size, time, sha256} for the record of what was trained on it."""
    return describe(files(folder), folder)


def fingerprint(entries: dict[str, dict[str, Any]]) -> str:
    """Of `described`: sizes and times left out."""
    return records.digest_of({name: entry["sha256"] for name, entry in entries.items()})


def changed(folder: Path, entries: dict[str, dict[str, Any]], thorough: bool = False) -> list[str]:
    """What of a base is no longer as `described` saw it; size and time tell, or, thorough, the content."""
    wrong = changed_files(entries, folder)
    wrong += [f"{show(file)} was not there" for file in files(folder) if file.name not in entries]
    if thorough and not wrong:
        wrong += [
            f"{show(folder / name)} has other content"
            for name, entry in entries.items()
            if records.sha256_once(folder / name) != entry["sha256"]
        ]
    return wrong


def terms(folder: Path, project: Path) -> str:
    """A sentence on what a base is and whose terms pass on, for a model card."""
    record = read_record(folder / RECORD_NAME) or {}
    for origin in record.get("origins", {}).values():
        source = _source(origin["id"], folder)
        return f"The base model is {source.id} ({source.licence}); its terms pass on."
    return f"The base model is `{os.path.relpath(folder, project)}`; its own terms pass on."


@dataclass(frozen=True)
class StandIn(RunPaths):
    """The run's folders with a base in the place of its raw model: what is predicted and probed is of this base."""

    base: Path = Path()

    @property
    def raw_model(self) -> Path:
        return self.base

    @property
    def tokenizer(self) -> Path:
        return self.base


def stand_in(profile: profiles.ModelProfile, paths: RunPaths, folder: Path) -> tuple[profiles.ModelProfile, RunPaths]:
    """(profile, paths) for `memory` and `precision`, which else ask for the run's raw model and its new tokens."""
    known = (paths.model, paths.data, paths.name, paths.given)
    return dataclasses.replace(profile, new_tokens=len(new_ids(folder))), StandIn(*known, base=folder)


# from the hub -------------------------------------------------------------------------------------------


def is_hub_id(text: str) -> bool:
    """True for `owner/name` as the hub has it."""
    return bool(HUB_ID.fullmatch(text))


def hub_folder(paths: RunPaths, hub_id: str) -> Path:
    """Where the files of a hub id go."""
    return paths.models / "raw" / hub_id.replace("/", "--")


def of_hub(paths: RunPaths, hub_id: str) -> Path:
    """The folder of a hub id, which is fetched where it is not here: a complete raw model of a profile is used.

    What is here is used without a question to the hub. Raises PipelineError in words for whatever keeps it from coming.
    """
    for profile in profiles.MODELS.values():
        raw = paths.models / "raw" / profile.name
        if profile.source == hub_id and read_record(raw / RECORD_NAME) is not None:
            log.info("%s is here as %s", hub_id, show(raw))
            return raw
    folder, again = hub_folder(paths, hub_id), _again(paths, hub_id)
    if read_record(folder / RECORD_NAME) is None:
        if processes.count() > 1:
            raise PipelineError(f"{hub_id} is not here yet, and several processes cannot fetch it; first run: {again}")
        log.info("%s: no such folder here; it is taken for a hub id", hub_id)
        download(paths, hub_id, argparse.Namespace(update=False, force=False, connections=hub.CONNECTIONS))
    elif wrong := check_outputs(folder / RECORD_NAME):
        raise PipelineError(
            f"{show(folder)} is not what was fetched:\n  " + "\n  ".join(wrong) + f"\nFetch it again: {again} --force"
        )
    return folder


def download(paths: RunPaths, hub_id: str, args: argparse.Namespace) -> int:
    """Fetch a hub id into its own folder; a model of another kind is refused before its weights come."""
    if not is_hub_id(hub_id):
        raise PipelineError(f"{hub_id}: not a hub id; one looks like google/medgemma-4b-it")
    folder = hub_folder(paths, hub_id)
    return fetch(want(_source(hub_id, folder), folder, _again(paths, hub_id)), args, paths, look_first=True)


def _again(paths: RunPaths, hub_id: str) -> str:
    return paths.command("download/download_model", "--hub-id", hub_id)


def _source(hub_id: str, folder: Path) -> Source:
    """The catalogue's row under the folder's name; for what is not in it, one like it."""
    for source in sources.SOURCES:
        if source.kind == "model" and source.id == hub_id:
            return dataclasses.replace(source, key=folder.name)
    licence = "the terms on its page"
    return Source(folder.name, hub_id, "model", "all", licence, files=sources.MODEL_FILES, quality="curated")


def want(source: Source, folder: Path, again: str) -> hub.Want:
    """A model that is to lie in `folder`; its pin stands beside all models."""
    pin = folder.parent / ".origins" / f"{folder.name}.json"
    record = read_record(folder / RECORD_NAME)
    if record and not pin.is_file() and source.key in record.get("origins", {}):
        records.write_json(pin, record["origins"][source.key])  # the folder alone was copied from another machine
    return hub.Want(source, folder, pin, again, folder.with_name(f".{folder.name}.partial"))


def fetch(want: hub.Want, args: argparse.Namespace, paths: RunPaths, look_first: bool = False) -> int:
    """Bring a model's folder about with its record; returns the exit code.

    What somebody put there by hand is compared with the published files, and offline used as it is. look_first: the
    configuration comes before the weights, which only a Gemma 3 is worth. Raises PipelineError.
    """
    if _brought(want.target):
        return _use_as_it_is(want, args, paths)
    (plan,) = hub.survey([want], args)
    if problem := _lacking(plan.files):
        if not want.target.exists():
            want.pin.unlink(missing_ok=True)
        raise PipelineError(f"{want.source.id}: {problem}; see {hub.page(want.source)}")
    stage = _stage(want, plan.files, args.force or plan.changed, paths)
    if (code := stage.already_complete()) is not None:
        hub.settle(plan)
        return code
    if args.update and (begun := want.partial / ".identity.json").is_file():
        records.write_json(begun, stage.identity())  # what is there of an older revision was checked file by file
    with stage.work(resumable=True) as folder:
        if look_first:
            _look(plan, folder)
        origin = hub.fetch(plan, args, paths, "download_model")
        _require_model(folder)
        stage.complete(counts={"files": len(plan.files), "bytes": plan.size}, origins={want.source.key: origin})
    hub.settle(plan)
    return 0


def _lacking(files: Iterable[str]) -> str:
    """What a published model lacks to be a base, before a byte of it is fetched; empty where it is whole."""
    if "config.json" not in files:
        return "no config.json in it; an adapter alone is no base"
    lacks = [] if "tokenizer.json" in files else ["tokenizer.json"]
    lacks += [] if any(name.endswith(".safetensors") for name in files) else ["safetensors weights"]
    return f"no {' and no '.join(lacks)} in it" if lacks else ""


def _look(plan: hub.Plan, folder: Path) -> None:
    """Raise PipelineError, and leave nothing behind, unless what is to be fetched is a Gemma 3."""
    want = plan.want
    file = hub.fetch_ahead(plan, "config.json")
    try:
        problem = kind_problem(file)
    except PipelineError:
        problem = "its config.json is not that of a model"
    if problem:
        shutil.rmtree(folder)
        want.pin.unlink(missing_ok=True)
        raise PipelineError(f"{want.source.id}: {problem}; see {hub.page(want.source)}")


def _brought(folder: Path) -> bool:
    """A folder that somebody put there, on a machine that is told not to ask the hub."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return offline and folder.is_dir() and not (folder / RECORD_NAME).is_file()


def _stage(want: hub.Want, files: dict[str, Any], force: bool, paths: RunPaths) -> Stage:
    # A new commit that only changes a page leaves the files, and with them every training, as they are.
    listed = {name: entry.get("git") or entry.get("sha256") for name, entry in files.items()}
    return Stage(
        "download_model",
        paths,
        outputs=[want.target],
        inputs=[],
        settings={"id": want.source.id, "files": records.digest_of(listed)},
        format=FORMAT,
        force=force,
        driver_stage="download",
        record_inside=True,
    )


def _require_model(folder: Path) -> None:
    if problems := missing(folder):
        raise PipelineError(f"{show(folder)} is not a whole model:\n  " + "\n  ".join(problems) + f"\n{NEEDS}")


def _use_as_it_is(want: hub.Want, args: argparse.Namespace, paths: RunPaths) -> int:
    """Give a folder that was brought by hand its record."""
    target = want.target
    _require_model(target)
    names = [p.name for p in sorted(target.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = {n: {"size": (target / n).stat().st_size, "sha256": records.sha256_once(target / n)} for n in names}
    stage = _stage(want, files, args.force, paths)
    log.warning("%s was brought by hand; offline it cannot be compared with the published model", show(target))
    with stage.work() as folder:
        for name in names:
            hub.link(target / name, folder / name)
        stage.warnings.append("brought by hand, not compared with the published model")
        origin = {"id": want.source.id, "revision": "unknown", "origin": "brought by hand", "files": files}
        stage.complete(counts={"files": len(files)}, origins={want.source.key: origin})
    return 0

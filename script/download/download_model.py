"""Get the base model: fetched from the hub (a licence to accept), or built on the spot for a model that is built.

Reads   hub: google/medgemma-4b-it or google/medgemma-27b-text-it; only the files that training needs
Writes  model/raw/<model>/

    python script/download/download_model.py --model medgemma-4b

A model that somebody copied to model/raw/<model>/ is compared with the published one, and what is the same is used;
with HF_HUB_OFFLINE=1 it is used as it is.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
from pathlib import Path

from medgemma_korean import cli, hub, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import RECORD_NAME, Stage, read_record

FORMAT = 1
INDEX = "model.safetensors.index.json"


def wanted(profile: ModelProfile, paths: RunPaths) -> list[hub.Want]:
    """The base model, where it comes from the hub."""
    if profile.source == "build":
        return []
    pin = paths.raw_model.parent / ".origins" / f"{profile.name}.json"
    into = paths.raw_model.with_name(f".{paths.raw_model.name}.partial")
    record = read_record(paths.raw_model / RECORD_NAME)
    if record and not pin.is_file() and profile.name in record.get("origins", {}):
        records.write_json(pin, record["origins"][profile.name])  # the folder alone was copied from another machine
    return [hub.Want(BY_KEY[profile.name], paths.raw_model, pin, paths.command("download/download_model"), into)]


def weights(folder: Path) -> list[str]:
    """What is wrong with the weights of a folder: shards of the index that are missing, files that are cut."""
    shards = set(records.read_json(folder / INDEX)["weight_map"].values()) if (folder / INDEX).is_file() else set()
    present = {p.name for p in folder.glob("*.safetensors")}
    problems = [f"{name} is missing, and {INDEX} names it" for name in sorted(shards - present)]
    if not present:
        problems.append("no safetensors weights")
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


def _end_of_data(header: bytes) -> int:
    import json

    try:
        entries = json.loads(header)
        return max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return -1


def check_model(folder: Path) -> None:
    """Raises PipelineError listing everything that keeps a folder from being a model."""
    problems = [f"{name} is missing" for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    problems += weights(folder)
    if problems:
        raise PipelineError(f"{show(folder)} is not a whole model:\n  " + "\n  ".join(problems))


def brought(args: argparse.Namespace, paths: RunPaths) -> bool:
    """A folder that somebody put there, on a machine that is told not to ask the hub."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return offline and paths.raw_model.is_dir() and not (paths.raw_model / RECORD_NAME).is_file()


def stage_of(paths: RunPaths, source_id: str, files: dict, force: bool) -> Stage:
    # A new commit that only changes a page leaves the files, and with them every training, as they are.
    listed = {name: entry.get("git") or entry.get("sha256") for name, entry in files.items()}
    return Stage(
        "download_model",
        paths,
        outputs=[paths.raw_model],
        inputs=[],
        settings={"id": source_id, "files": records.digest_of(listed)},
        format=FORMAT,
        force=force,
        driver_stage="download",
        record_inside=True,
    )


def use_as_it_is(paths: RunPaths, source_id: str, force: bool) -> int:
    """Give a folder that was brought by hand its record."""
    check_model(paths.raw_model)
    names = [p.name for p in sorted(paths.raw_model.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = {
        n: {"size": (paths.raw_model / n).stat().st_size, "sha256": records.sha256_once(paths.raw_model / n)}
        for n in names
    }
    stage = stage_of(paths, source_id, files, force)
    log.warning("%s was brought by hand; offline it cannot be compared with the published model", show(paths.raw_model))
    with stage.work() as folder:
        for name in names:
            hub.link(paths.raw_model / name, folder / name)
        stage.warnings.append("brought by hand, not compared with the published model")
        origin = {"id": source_id, "revision": "unknown", "origin": "brought by hand", "files": files}
        stage.complete(counts={"files": len(files)}, origins={paths.model: origin})
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    hub.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if profile.source == "build":
        # Its own process: a program never imports another one.
        builder = Path(__file__).parents[1] / "model" / "build_tiny_model.py"
        return subprocess.call([sys.executable, str(builder), *cli.shared_argv(args)])
    cli.start_logging(paths, "download_model")
    source = BY_KEY[profile.name]
    if brought(args, paths):
        return use_as_it_is(paths, source.id, args.force)
    (plan,) = hub.survey(wanted(profile, paths), args)
    stage = stage_of(paths, source.id, plan.files, args.force or plan.changed)
    if (code := stage.already_complete()) is not None:
        hub.settle(plan)
        return code
    if args.update and (begun := plan.want.partial / ".identity.json").is_file():
        records.write_json(begun, stage.identity())  # what is there of an older revision was checked file by file
    with stage.work(resumable=True) as folder:
        origin = hub.fetch(plan, args, paths, "download_model")
        check_model(folder)
        stage.complete(counts={"files": len(plan.files), "bytes": plan.size}, origins={source.key: origin})
    hub.settle(plan)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

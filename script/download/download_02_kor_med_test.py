"""Get the KorMedMCQA exam questions of four exams, or check what is already there.

Reads   hub: sean0042/KorMedMCQA (CC BY-NC 2.0)
Writes  data/01_raw/02_kor_med_test/{train,dev,test,fewshot}.jsonl (fewshot is optional for readers);
        the shards as published in data/01_raw/.published/kor_med_test/

    python script/download/download_02_kor_med_test.py --model medgemma-4b
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path

from medgemma_korean import cli, hub, mcq, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.sources import BY_KEY, check_columns
from medgemma_korean.stage import Input, Stage
from medgemma_korean.text.clean import normalise_line

FORMAT = 1
SOURCE = BY_KEY["kor_med_test"]
SPLITS = ("train", "dev", "test")
# Rows by exam and split as published; another number means another data set, or a shard that is there twice.
EXPECTED = {
    "doctor": {"train": 1890, "dev": 164, "test": 435, "fewshot": 5},
    "nurse": {"train": 582, "dev": 291, "test": 878, "fewshot": 5},
    "pharm": {"train": 632, "dev": 300, "test": 885, "fewshot": 5},
    "dentist": {"train": 297, "dev": 304, "test": 811, "fewshot": 5},
}
KEY = ("exam_type", "year", "period", "q_number")


def published(paths: RunPaths) -> Path:
    """Where the shards stay as they were published; readers of 01_raw do not look there."""
    return paths.raw / ".published" / SOURCE.key


def wanted(args: argparse.Namespace, paths: RunPaths) -> list[hub.Want]:
    """The data set, unless somebody put the questions there."""
    if paths.raw_mcq.exists() and not hub.pin(paths, SOURCE).is_file():
        return []
    return [hub.want(paths, SOURCE, published(paths), "download_02_kor_med_test")]


def read_split(folder: Path, exam: str, split: str) -> tuple[list[dict], list[Path]]:
    """The rows of one exam's split with `exam_type`, and the files they stand in. Raises PipelineError."""
    files = sorted({*folder.glob(f"{exam}/{split}-*.parquet"), *folder.glob(f"data/{exam}/{split}-*.parquet")})
    rows = []
    for file in files:
        for row in records.read_parquet(file):
            if not rows and (missing := check_columns(SOURCE, row)):
                raise PipelineError(f"{show(file)}: {'; '.join(missing)}")
            rows.append({**row, "exam_type": exam})
    return rows, files


def convert(folder: Path, target: Path) -> dict[str, int]:
    """The hub's Parquet shards as one JSONL a split; returns rows by split.

    Raises PipelineError with all numbers that are wrong: rows of a split, keys that are there twice.
    """
    splits: dict[str, list[dict]] = {split: [] for split in (*SPLITS, "fewshot")}
    problems = []
    for exam, sizes in EXPECTED.items():
        for split, expected in sizes.items():
            rows, files = read_split(folder, exam, split)
            if len(rows) != expected:
                names = ", ".join(str(f.relative_to(folder)) for f in files) or "no file"
                problems.append(f"{exam} {split}: {len(rows):,} rows, expected {expected:,} (in {names})")
            splits[split] += rows
    for split, rows in splits.items():
        keys = Counter(tuple(row[part] for part in KEY) for row in rows)
        if doubled := [key for key, n in keys.items() if n > 1]:
            first = ", ".join(f"{part} {value}" for part, value in zip(KEY, doubled[0], strict=True))
            problems.append(f"{split}: {cli.count(len(doubled), 'question')} more than once, first {first}")
    if problems:
        raise PipelineError(
            "KorMedMCQA is not the data set that is expected, and is not used:\n  " + "\n  ".join(problems)
        )
    for split, rows in splits.items():
        records.write_jsonl(target / f"{split}.jsonl", rows)
    return {split: len(rows) for split, rows in splits.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    hub.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_02_kor_med_test")
    folder = paths.raw_mcq
    wants = wanted(args, paths)
    origins, changed = hub.ensure(wants, args, paths, "download_02_kor_med_test")
    changed |= hub.altered(paths.record("download_02_kor_med_test"), args.force)
    missing = [show(folder / f"{split}.jsonl") for split in SPLITS if not (folder / f"{split}.jsonl").is_file()]
    if wants and (changed or missing):
        part = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(part, ignore_errors=True)
        try:
            sizes = convert(published(paths), part)
        except PipelineError as error:
            page, again = hub.page(SOURCE), paths.command("download/download_02_kor_med_test", "--update")
            raise PipelineError(f"{error}\nSee {page}; for a newer revision: {again}") from None
        hub.publish(part, folder)
        log.info("%s: %s", show(folder), ", ".join(f"{n:,} {split}" for split, n in sizes.items()))
    elif missing:
        raise PipelineError(f"missing: {', '.join(missing)}; bring it, or move {show(folder)} away to have all fetched")
    stage = Stage(
        "download_02_kor_med_test",
        paths,
        outputs=[folder],
        inputs=[Input("exam questions", folder)],
        settings={},
        format=FORMAT,
        force=args.force or changed,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        counts = {}
        for file in records.row_files(folder):
            unusable = [] if file.stem == "train" else None
            rows = mcq.read_raw_items(file, normalise_line, unusable)
            if not rows:
                raise PipelineError(f"{show(file)}: no usable questions; bring the split anew")
            if unusable:
                log.warning("%s will be left out, first: %s", cli.count(len(unusable), "question"), unusable[0])
            counts[file.stem] = len(rows)
            log.info("%s: %s", show(file), cli.count(len(rows), "question"))
        stage.complete(counts=counts, origins=origins)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

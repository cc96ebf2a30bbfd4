"""Get instruction, reasoning and MCQ sets of the catalogue, by key, by kind, or all. No stage needs them yet.

Reads   hub: the sets of `download_all.py --list`
Writes  data/01_raw/by_source/<key>/, as published

    python script/download/download_instruction.py --model medgemma-4b --key medical_o1_reasoning_ko
    python script/download/download_instruction.py --model medgemma-4b --kind reasoning

Sets that serve evaluation only are fetched when they are named, and never enter training.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

from medgemma_korean import cli, hub, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.sources import BY_KEY, SOURCES, Source, check_columns
from medgemma_korean.stage import Input, Stage

FORMAT = 1
KINDS = ("instruction", "reasoning", "MCQ")
KNOWN = [s.key for s in SOURCES if s.folder.startswith("by_source/") and s.files]


def chosen(args: argparse.Namespace) -> list[Source]:
    """The sources that the options name. Raises PipelineError for an unknown key or no choice."""
    if unknown := [key for key in args.key or [] if key not in KNOWN]:
        raise PipelineError(f"--key {', '.join(unknown)}: unknown; known are {', '.join(KNOWN)}")
    if args.key:
        return [BY_KEY[key] for key in args.key]
    kinds = KINDS if args.all else (args.kind,) if args.kind else ()
    if not kinds:
        raise PipelineError("say what to get: --key KEY, --kind KIND or --all")
    return [BY_KEY[key] for key in KNOWN if BY_KEY[key].kind in kinds]


def count_rows(file: Path) -> int:
    """Rows of a file; from its footer where it has one."""
    if file.suffix == ".parquet":
        return records.parquet_rows(file)
    return sum(1 for _ in records.read_rows(file))


def check(source: Source, folder: Path, warnings: list[str]) -> dict[str, int]:
    """Rows by file. A column that is known to be there and is not raises PipelineError; one only read about warns."""
    files = records.row_files(folder)
    if not files:
        raise PipelineError(f"{show(folder)}: no row files")
    counts = {}
    for file in files:
        for row in islice(records.read_rows(file), 1):
            if missing := check_columns(source, row):
                message = f"{show(file)}: {'; '.join(missing)}"
                if source.columns_seen:
                    raise PipelineError(message)
                warnings.append(message)
        counts[str(file.relative_to(folder))] = count_rows(file)
    if not sum(counts.values()):
        raise PipelineError(f"{show(folder)}: no rows")
    expected = sum(number for _, number in source.rows)
    if source.rows_seen and expected and sum(counts.values()) != expected:
        warnings.append(
            f"{source.key}: {sum(counts.values()):,} rows; {expected:,} were published when it was described"
        )
    return counts


def get(source: Source, args: argparse.Namespace, paths: RunPaths) -> int:
    target = paths.raw / source.folder
    name = f"download_instruction.{source.key}"
    wants = [hub.want(paths, source, target, "download_instruction", "--key", source.key)]
    origins, changed = hub.ensure(wants, args, paths, "download_instruction", name)
    stage = Stage(
        name,
        paths,
        outputs=[target],
        inputs=[Input(source.key, target)],
        settings={},
        format=FORMAT,
        force=args.force or changed,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        counts = check(source, target, stage.warnings)
        for warning in stage.warnings:
            log.warning("%s", warning)
        stage.complete(counts=counts, origins=origins)
    log.info("%s: %s, licence %s", show(target), cli.count(sum(counts.values()), "row"), source.licence)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--key", action="append", metavar="KEY", help="a set by its key; may be repeated")
    parser.add_argument("--kind", choices=KINDS, help="all sets of a kind")
    parser.add_argument("--all", action="store_true", help="all training sets of the catalogue")
    hub.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    sources = chosen(args)
    cli.start_logging(paths, "download_instruction")
    # All are asked for first: a set whose terms are not accepted is told before hours of the others.
    hub.survey(
        [hub.want(paths, s, paths.raw / s.folder, "download_instruction", "--key", s.key) for s in sources], args
    )
    for source in sources:
        if code := get(source, args, paths):
            return code
    hub.say_fetched()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Get instruction, reasoning and MCQ sets of the catalogue, by key, by kind, or all. No stage needs them yet.

Reads   hub: the sets of `download_all.py --list`
Writes  data/01_raw/by_source/<key>/

    python script/download/download_instruction.py --model medgemma-4b --key medical_o1_reasoning_ko
    python script/download/download_instruction.py --model medgemma-4b --kind reasoning

Sets that serve evaluation only are fetched when they are named, and never enter training.
"""

from __future__ import annotations

import argparse
import sys

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.sources import BY_KEY, SOURCES, Source
from medgemma_korean.stage import describe

KINDS = ("instruction", "reasoning", "MCQ")


def chosen(args: argparse.Namespace) -> list[Source]:
    """The sources that the options name. Raises PipelineError for an unknown key or no choice."""
    known = [source.key for source in SOURCES if source.folder.startswith("by_source/")]
    if unknown := [key for key in args.key or [] if key not in known]:
        raise PipelineError(f"--key {', '.join(unknown)}: unknown; known are {', '.join(known)}")
    if args.key:
        return [BY_KEY[key] for key in args.key]
    kinds = KINDS if args.all else (args.kind,) if args.kind else ()
    if not kinds:
        raise PipelineError("say what to get: --key KEY, --kind KIND or --all")
    return [BY_KEY[key] for key in known if BY_KEY[key].kind in kinds]


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, force=False)
    parser.add_argument("--key", action="append", metavar="KEY", help="a set by its key; may be repeated")
    parser.add_argument("--kind", choices=KINDS, help="all sets of a kind")
    parser.add_argument("--all", action="store_true", help="all training sets of the catalogue")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    sources = chosen(args)
    cli.start_logging(paths, "download_instruction")
    for source in sources:
        target = paths.raw / source.folder
        if target.exists():
            log.info("%s: already there", show(target))
            continue
        from medgemma_korean import hub

        again = paths.command("download/download_instruction", "--key", source.key)
        origin = hub.fetch(source, target, repo_type="dataset", what=again)
        record = paths.raw / ".stages" / f"download_instruction.{source.key}.json"
        records.write_json(record, {"origin": origin, "outputs": describe([target], paths.data)})
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

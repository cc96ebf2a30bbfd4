"""Get Korean plain text and the English replay slice, or check what is already there.

Reads   hub: NamuWiki, Korean Wikipedia, C4 Korean (up to --max-gb), one shard of English Wikipedia
Writes  data/01_raw/00_korean/<source>/, data/01_raw/00_english_replay/, as published

    python script/download/download_00_plain_text.py --model medgemma-4b
    python script/download/download_00_plain_text.py --model medgemma-4b --source wikipedia-korean

A data folder in which a person has put Korean text is used as it is; --source adds to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medgemma_korean import cli, hub
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.sources import BY_KEY, SOURCES, Source
from medgemma_korean.stage import Input, Stage
from medgemma_korean.text import documents

FORMAT = 1
KNOWN = [s.key for s in SOURCES if s.stage == "00" and s.place == "hub"]


def of_a_person(paths: RunPaths) -> list[Path]:
    """What lies in 00_korean without a pin of ours: text that somebody put there. AI Hub's folder does not count."""
    if paths.raw_korean.is_file():
        raise PipelineError(
            f"{show(paths.raw_korean)}: a file where the folder of the sources is expected; move it away"
        )
    if not paths.raw_korean.is_dir():
        return []
    ours = {BY_KEY[key].folder for key in KNOWN if hub.pin(paths, BY_KEY[key]).is_file()} | {BY_KEY["aihub"].folder}
    folders = [p for p in sorted(paths.raw_korean.iterdir()) if not p.name.startswith(".")]
    return [p for p in folders if str(p.relative_to(paths.raw)) not in ours and (p.is_file() or documents.files_of(p))]


def chosen(args: argparse.Namespace, paths: RunPaths) -> list[Source]:
    """The sources to have: those named, else those begun, else the default ones where nobody put text of their own."""
    named = getattr(args, "source", None) or []
    if unknown := [key for key in named if key not in KNOWN]:
        raise PipelineError(f"--source {', '.join(unknown)}: unknown; known are {', '.join(KNOWN)}")
    begun = [key for key in KNOWN if hub.pin(paths, BY_KEY[key]).is_file()]
    if not named and not of_a_person(paths):
        named = [key for key in KNOWN if BY_KEY[key].default]
    return [BY_KEY[key] for key in KNOWN if key in {*named, *begun}]


def wanted(args: argparse.Namespace, paths: RunPaths) -> list[hub.Want]:
    again = [o for key in getattr(args, "source", None) or [] for o in ("--source", key)]
    return [
        hub.want(paths, source, paths.raw / source.folder, "download_00_plain_text", *again)
        for source in chosen(args, paths)
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--source", action="append", metavar="KEY", help=f"one of {', '.join(KNOWN)}; may be repeated")
    hub.add_options(parser, max_gb=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_00_plain_text")
    origins, changed = hub.ensure(wanted(args, paths), args, paths, "download_00_plain_text")
    for folder in (*(own := of_a_person(paths)), paths.raw / BY_KEY["aihub"].folder):
        if folder.exists():
            licence = BY_KEY[folder.name].licence if folder.name in BY_KEY else "as its owner says"
            origins[folder.name] = {"origin": "brought by hand", "licence": licence}
    if own:
        log.info("%s holds text of its own, which is used as it is; --source fetches more", show(paths.raw_korean))
    stage = Stage(
        "download_00_plain_text",
        paths,
        outputs=[paths.raw_korean],
        inputs=[Input("Korean text", paths.raw_korean), Input("English replay", paths.raw_english)],
        settings={},
        format=FORMAT,
        force=args.force or changed,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        counts = {}
        korean = sorted(p for p in paths.raw_korean.iterdir() if p.is_dir() and not p.name.startswith("."))
        for folder in (*korean, paths.raw_english):
            counts[folder.name] = documents.check(folder)
            log.info("%s: %s", show(folder), cli.count(counts[folder.name], "readable file"))
        if not paths.raw_english.is_relative_to(paths.raw):
            log.info("no 00_english_replay in %s; the sample's English text is replayed", show(paths.raw))
        stage.complete(counts=counts, origins=origins)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Get Korean plain text and the English replay slice, or check what is already there.

Reads   hub: NamuWiki, Korean Wikipedia, C4 Korean, one shard of English Wikipedia
Writes  data/01_raw/00_korean/<source>/, data/01_raw/00_english_replay/

    python script/download/download_00_plain_text.py --model medgemma-4b

A data folder that holds Korean text already is used as it is; every source there must have readable rows.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.sources import SOURCES
from medgemma_korean.stage import Input, Stage

FORMAT = 1


def check_source(folder: Path) -> int:
    """Row files of one source; each must open and its first rows must have text. Returns the number of files."""
    files = records.row_files(folder)
    if not files:
        raise PipelineError(f"{show(folder)}: no row files (.jsonl, .jsonl.gz, .json, .parquet)")
    for file in files:
        first = list(islice(records.read_rows(file), 3))
        if not first:
            raise PipelineError(f"{show(file)}: no rows")
        for row in first:
            if not isinstance(row.get("text"), str):
                raise PipelineError(f'{show(file)}: no column "text"; found {", ".join(row)}')
    return len(files)


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_00_plain_text")
    origins = {}
    # Written before the first download and removed after the last: without it a run that broke off after one source
    # would pass for a data folder that a person filled.
    begun = paths.record("download_00_plain_text").with_suffix(".begun")
    if begun.is_file() or not records.row_files(paths.raw_korean):
        from medgemma_korean import hub

        origins = records.read_json(begun) if begun.is_file() else {}
        records.write_json(begun, origins)
        again = paths.command("download/download_00_plain_text")
        for source in (s for s in SOURCES if s.stage == "00"):
            if not (paths.raw / source.folder).exists():
                origins[source.key] = hub.fetch(source, paths.raw / source.folder, repo_type="dataset", what=again)
                records.write_json(begun, origins)
        begun.unlink()
    stage = Stage(
        "download_00_plain_text",
        paths,
        outputs=[paths.raw_korean],
        inputs=[Input("Korean text", paths.raw_korean), Input("English replay", paths.raw_english)],
        settings={},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        counts = {}
        for folder in (*sorted(p for p in paths.raw_korean.iterdir() if p.is_dir()), paths.raw_english):
            counts[folder.name] = check_source(folder)
            log.info("%s: %s", show(folder), cli.count(counts[folder.name], "readable file"))
        if not paths.raw_english.is_relative_to(paths.raw):
            log.info("no 00_english_replay in %s; the sample's English text is replayed", show(paths.raw))
        stage.complete(counts=counts, origins=origins)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Check the five dictionary files that a person brings; everything missing or wrong is listed at once.

Reads   data/01_raw/01_medical_dict/ (MANUAL_DATA.md says where people get the files)
Writes  the files that StarDict dictionaries lying there become, once all five are in order; its record

    python script/download/download_01_medical_dict.py --model medgemma-4b
"""

from __future__ import annotations

import sys

from medgemma_korean import cli, stardict
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary_check import check_files
from medgemma_korean.dictionary_files import MANUAL_FILES
from medgemma_korean.stage import Input, Stage

FORMAT = 3


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_01_medical_dict")
    folder = paths.raw_dictionary
    conversions, unusable = stardict.convert(folder)
    checked = check_files(folder, {conversion.name: conversion.data for conversion in conversions})
    if unusable or checked.errors:
        lines = unusable + checked.errors + [f"(a warning) {text}" for text in checked.warnings]
        raise PipelineError(
            "the medical dictionary is not ready:\n  "
            + "\n  ".join(lines)
            + "\nMANUAL_DATA.md says where these files come from and how they look; --skip-01 runs without them."
        )
    stardict.publish(folder, conversions)
    files = [folder / manual.name for manual in MANUAL_FILES]
    stage = Stage(
        "download_01_medical_dict",
        paths,
        outputs=files,
        inputs=[Input(f"dictionary files: {file.name}", file) for file in files],
        settings={},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        for name, number in checked.counts.items():
            log.info("%s: %d entries", name, number)
        for text in checked.warnings:
            log.warning("warning: %s", text)
        stage.warnings += checked.warnings
        made = {mark["file"]: source for source, mark in stardict.made_before(folder).items()}
        stage.complete(counts=checked.counts, converted=made)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Check the five dictionary files that a person brings; everything missing or malformed is listed at once.

Reads   data/01_raw/01_medical_dict/ (MANUAL_DATA.md says where people get the files)
Writes  nothing but its record

    python script/download/download_01_medical_dict.py --model medgemma-4b
"""

from __future__ import annotations

import sys

from medgemma_korean import cli
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary import MANUAL_FILES, missing_files, read_manual_file
from medgemma_korean.paths import show
from medgemma_korean.stage import Input, Stage

FORMAT = 1


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_01_medical_dict")
    folder = paths.raw_dictionary
    problems = [f"{show(folder / name)} is missing" for name in missing_files(folder)]
    counts = {}
    for manual in MANUAL_FILES:
        if not (folder / manual.name).is_file():
            continue
        try:
            counts[manual.name] = sum(1 for _ in read_manual_file(folder, manual))
            if not counts[manual.name]:
                problems.append(f"{show(folder / manual.name)} has no entries")
        except PipelineError as error:
            problems.append(str(error))
    if problems:
        raise PipelineError(
            "the medical dictionary is not ready:\n  "
            + "\n  ".join(problems)
            + "\nMANUAL_DATA.md says where these files come from and how they look; --skip-01 runs without them."
        )
    stage = Stage(
        "download_01_medical_dict",
        paths,
        outputs=[folder],
        inputs=[Input("dictionary files", folder)],
        settings={},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        for name, number in counts.items():
            log.info("%s: %d entries", name, number)
        stage.complete(counts=counts)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

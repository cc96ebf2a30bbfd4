"""Merge the five dictionary files into one: cleaned terms, every sense kept, sources recorded.

Reads   data/01_raw/01_medical_dict/, the five files that download_01_medical_dict checks
Writes  data/02_refined/01_medical_dict.json : [{"term", "definition", "senses", "source", "category", "aliases"?}]

    python script/refine/refine_01_medical_dict.py --model tiny
    python script/refine/refine_01_medical_dict.py --model medgemma-4b --no-veterinary
"""

from __future__ import annotations

import sys

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary import Entry, merge
from medgemma_korean.dictionary_files import MANUAL_FILES, missing_files, read_manual_file
from medgemma_korean.paths import REPOSITORY, SAMPLE_DATA, RunPaths, project_root, show
from medgemma_korean.stage import Input, Stage

FORMAT = 4
FEWEST = 4000  # merged terms of the five real files, veterinary ones among them: 4,049 were counted once


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--no-veterinary", action="store_true", help="leave the animal dictionary out")
    return parser


def is_sample(paths: RunPaths) -> bool:
    return paths.data in (SAMPLE_DATA, project_root() / SAMPLE_DATA.relative_to(REPOSITORY))


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "refine_01_medical_dict")
    raw = paths.raw_dictionary
    if missing := missing_files(raw):
        check = paths.command("download/download_01_medical_dict")
        raise PipelineError(
            f"{show(raw)} lacks {', '.join(missing)}; see MANUAL_DATA.md, or use --skip-01. "
            f"To check what is there, and to convert StarDict files, run: {check}"
        )
    stage = Stage(
        "refine_01_medical_dict",
        paths,
        outputs=[paths.dictionary],
        inputs=[Input(f"dictionary files: {manual.name}", raw / manual.name) for manual in MANUAL_FILES],
        settings={"veterinary": not args.no_veterinary},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work() as folder:
        entries: list[Entry] = []
        for manual in MANUAL_FILES:
            entries += read_manual_file(raw, manual)
        terms, counts = merge(entries, veterinary=not args.no_veterinary)
        if not terms:
            raise PipelineError(
                f"{show(raw)}: no usable entry ({cli.listed(counts)}); MANUAL_DATA.md says how the files look"
            )
        records.write_json(folder / paths.dictionary.name, [term.row() for term in terms])
        log.info("%s", cli.table([[k, f"{n:,}"] for k, n in counts.items()], ["dictionary entries", "number"]))
        if len(terms) < FEWEST and not args.no_veterinary and not is_sample(paths):
            stage.warnings.append(
                f"the dictionary has {len(terms):,} terms; five whole files give more than {FEWEST:,} (MANUAL_DATA.md)"
            )
            log.warning("%s", stage.warnings[-1])
        stage.complete(counts=dict(counts), metric=f"{len(terms):,} terms")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

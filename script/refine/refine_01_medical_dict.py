"""Merge the five dictionary files into one: cleaned terms, every sense kept, sources recorded.

Reads   data/01_raw/01_medical_dict/
Writes  data/02_refined/01_medical_dict.json : [{"term", "definition", "senses", "source", "category"}]

    python script/refine/refine_01_medical_dict.py --model tiny
"""

from __future__ import annotations

import sys

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary import MANUAL_FILES, Entry, merge, missing_files, read_manual_file
from medgemma_korean.paths import show
from medgemma_korean.stage import Input, Stage

FORMAT = 1


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--no-veterinary", action="store_true", help="leave the animal dictionary out")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "refine_01_medical_dict")
    if paths.raw_dictionary.is_dir() and (missing := missing_files(paths.raw_dictionary)):
        raise PipelineError(f"{show(paths.raw_dictionary)} lacks {', '.join(missing)}; see MANUAL_DATA.md")
    stage = Stage(
        "refine_01_medical_dict",
        paths,
        outputs=[paths.dictionary],
        inputs=[Input("dictionary files", paths.raw_dictionary, repair="see MANUAL_DATA.md, or use --skip-01")],
        settings={"veterinary": not args.no_veterinary},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work() as folder:
        entries: list[Entry] = []
        for manual in MANUAL_FILES:
            entries += read_manual_file(paths.raw_dictionary, manual)
        terms, counts = merge(entries, veterinary=not args.no_veterinary)
        if not terms:
            raise PipelineError(f"{show(paths.raw_dictionary)}: no usable entry of {counts['read']}; {dict(counts)}")
        records.write_json(folder / paths.dictionary.name, [term.row() for term in terms])
        log.info("%s", cli.table([[k, f"{n:,}"] for k, n in counts.items()], ["dictionary entries", "number"]))
        stage.complete(counts=dict(counts), metric=f"{len(terms):,} terms")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

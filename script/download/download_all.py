"""Get everything that one model's run needs, in order; what is there already is checked and left alone.

Reads   the hub, and the dictionary files that a person brings
Writes  data/01_raw/, model/raw/<model>/

    python script/download/download_all.py --model medgemma-4b
    python script/download/download_all.py --list      # the catalogue: what, licence, size
"""

from __future__ import annotations

import argparse
import sys

from medgemma_korean import cli, hub, sources

import download_00_plain_text
import download_01_english_korean
import download_01_medical_dict
import download_02_kor_med_test
import download_model


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--skip-01", action="store_true", help="do without the dictionary and the sentence pairs")
    parser.add_argument("--list", action="store_true", help="print the catalogue and end")
    hub.add_options(parser, max_gb=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.list:
        print(sources.listing())
        return 0
    profile, paths = cli.resolve(args)
    shared = cli.shared_argv(args)
    options = [*shared, *hub.shared_options(args)]
    # The files a person brings come first: a download of hours must not end at a missing one.
    if not args.skip_01 and (code := download_01_medical_dict.main(shared)):
        return code
    cli.start_logging(paths, "download_all")
    wants = [] if args.skip_01 else download_01_english_korean.wanted(args, paths)
    wants += download_02_kor_med_test.wanted(args, paths) + download_00_plain_text.wanted(args, paths)
    # So do all terms, sizes and the space on the disk.
    hub.survey(wants + download_model.wanted(profile, paths), args)
    steps = [] if args.skip_01 else [(download_01_english_korean, options)]
    steps += [
        (download_02_kor_med_test, options),
        (download_00_plain_text, [*shared, *hub.shared_options(args, max_gb=True)]),
        (download_model, options),
    ]
    for program, argv in steps:
        if code := program.main(argv):
            return code
    cli.start_logging(paths, "download_all")
    hub.say_fetched()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Get everything that one model's run needs, in order; what is there already is checked and left alone.

Reads   the hub, and the dictionary files that a person brings
Writes  data/01_raw/, model/raw/<model>/

    python script/download/download_all.py --model medgemma-4b
    python script/download/download_all.py --list      # the catalogue: what, licence, size
"""

from __future__ import annotations

import sys

from medgemma_korean import cli
from medgemma_korean.sources import SOURCES

import download_00_plain_text
import download_01_english_korean
import download_01_medical_dict
import download_02_kor_med_test
import download_model


def main(argv: list[str] | None = None) -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--skip-01", action="store_true", help="do without the dictionary and the sentence pairs")
    parser.add_argument("--list", action="store_true", help="print the catalogue and end")
    args = parser.parse_args(argv)
    if args.list:
        rows = [[s.key, s.kind, s.stage, s.licence, "yes" if s.gated else "no", s.size, s.id] for s in SOURCES]
        print(cli.table(rows, ["key", "kind", "stage", "licence", "gated", "size", "id"]))
        return 0
    shared = cli.shared_argv(args)
    # The files a person brings come first: a download of hours must not end at a missing one.
    stage_01 = [] if args.skip_01 else [download_01_medical_dict, download_01_english_korean]
    for program in (*stage_01, download_02_kor_med_test, download_00_plain_text, download_model):
        if code := program.main(shared):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

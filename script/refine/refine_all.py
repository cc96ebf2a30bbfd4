"""Refine everything that one model's run needs, in order.

Reads   data/01_raw/
Writes  data/02_refined/

    python script/refine/refine_all.py --model tiny
"""

from __future__ import annotations

import sys

from medgemma_korean import cli

import refine_00_plain_text
import refine_01_english_korean
import refine_01_medical_dict
import refine_02_kor_med_test


def main(argv: list[str] | None = None) -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--skip-01", action="store_true", help="do without the dictionary and the sentence pairs")
    args = parser.parse_args(argv)
    shared = cli.shared_argv(args)
    stage_01 = [] if args.skip_01 else [refine_01_medical_dict, refine_01_english_korean]
    for program in (refine_00_plain_text, *stage_01, refine_02_kor_med_test):
        if code := program.main(shared):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

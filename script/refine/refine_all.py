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
    parser.add_argument("--no-veterinary", action="store_true", help="leave the animal dictionary out")
    parser.add_argument("--workers", type=cli.positive_int, metavar="N", help="processes for the plain text")
    args = parser.parse_args(argv)
    text = ["--workers", str(args.workers)] if args.workers else []
    dictionary = ["--no-veterinary"] if args.no_veterinary else []
    programs = [(refine_00_plain_text, text)]
    if not args.skip_01:
        programs += [(refine_01_medical_dict, dictionary), (refine_01_english_korean, [])]
    for program, options in [*programs, (refine_02_kor_med_test, [])]:
        if code := program.main([*cli.shared_argv(args), *options]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

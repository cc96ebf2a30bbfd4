"""Model, tokenizer and first adapter of one model, in order: everything that training starts from.

Reads   the refined data (script/refine/refine_all.py makes it)
Writes  model/raw/<model>/, model/tokenizer/<name>/, model/raw_lora_added/<name>/

    python script/model/prepare_all.py --model tiny
    python script/model/prepare_all.py --model medgemma-4b --new-tokens auto

What is already complete stays as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from medgemma_korean import cli

import add_lora
import prepare_tokenizer


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True)
    prepare_tokenizer.add_size_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    with_device = cli.shared_argv(args)
    shared = cli.shared_argv(argparse.Namespace(**{**vars(args), "device": None}))
    # Its own process: it lies in another folder, and a program imports only siblings.
    download = Path(__file__).parents[1] / "download" / "download_model.py"
    if code := subprocess.call([sys.executable, str(download), *shared]):
        return code
    sizes = []
    for option, value in (("--new-tokens", args.new_tokens), ("--min-count", args.min_count)):
        sizes += [] if value is None else [option, str(value)]
    return prepare_tokenizer.main([*shared, *sizes]) or add_lora.main(with_device)


if __name__ == "__main__":
    sys.exit(cli.run(main))

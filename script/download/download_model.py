"""Get the base model: fetched from the hub (a licence to accept), or built on the spot for a model that is built.

Reads   hub: google/medgemma-4b-it or google/medgemma-27b-text-it; only the files that training needs
Writes  model/raw/<model>/

    python script/download/download_model.py --model medgemma-4b
    python script/download/download_model.py --hub-id google/gemma-3-1b-it      # to model/raw/google--gemma-3-1b-it/

A model that somebody copied to model/raw/<model>/ is compared with the published one, and what is the same is used;
with HF_HUB_OFFLINE=1 it is used as it is. --hub-id fetches any other Gemma 3, for `--base-model` of a train program.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from medgemma_korean import base_model, cli, hub
from medgemma_korean.paths import RunPaths
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.sources import BY_KEY


def wanted(profile: ModelProfile, paths: RunPaths) -> list[hub.Want]:
    """The base model, where it comes from the hub."""
    if profile.source == "build":
        return []
    return [base_model.want(BY_KEY[profile.name], paths.raw_model, paths.command("download/download_model"))]


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    hub.add_options(parser)
    parser.add_argument("--hub-id", metavar="OWNER/NAME", help="fetch this Gemma 3 instead, to model/raw/OWNER--NAME/")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.hub_id is not None:
        cli.start_logging(paths, "download_model")
        return base_model.download(paths, args.hub_id, args)
    if profile.source == "build":
        # Its own process: a program never imports another one.
        builder = Path(__file__).parents[1] / "model" / "build_tiny_model.py"
        code = subprocess.call([sys.executable, str(builder), *cli.shared_argv(args)])
        return code if code >= 0 else 128 - code  # of a signal, as a shell tells it
    cli.start_logging(paths, "download_model")
    (want,) = wanted(profile, paths)
    return base_model.fetch(want, args, paths)


if __name__ == "__main__":
    sys.exit(cli.run(main))

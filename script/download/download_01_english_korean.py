"""Get Korean-English sentence pairs, or check what is already there.

Reads   hub: Tatoeba pairs
Writes  data/01_raw/03_korean_english/<source>/

    python script/download/download_01_english_korean.py --model medgemma-4b
"""

from __future__ import annotations

import sys
from itertools import islice

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import Input, Stage

FORMAT = 1
COLUMNS = (("en", "english"), ("ko", "non_english"))  # ours, then the hub set's


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_01_english_korean")
    origins = {}
    if not records.row_files(paths.raw_pairs):
        from medgemma_korean import hub

        source = BY_KEY["opus_tatoeba_ko_en"]
        again = paths.command("download/download_01_english_korean")
        origins[source.key] = hub.fetch(source, paths.raw / source.folder, repo_type="dataset", what=again)
    stage = Stage(
        "download_01_english_korean",
        paths,
        outputs=[paths.raw_pairs],
        inputs=[Input("sentence pairs", paths.raw_pairs)],
        settings={},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        counts = {}
        for file in records.row_files(paths.raw_pairs):
            for row in islice(records.read_rows(file), 3):
                if not all(any(isinstance(row.get(name), str) for name in names) for names in COLUMNS):
                    raise PipelineError(f'{show(file)}: needs the columns "en" and "ko"; found {", ".join(row)}')
            counts[file.parent.name] = counts.get(file.parent.name, 0) + 1
            log.info("%s: readable", show(file))
        stage.complete(counts=counts, origins=origins)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

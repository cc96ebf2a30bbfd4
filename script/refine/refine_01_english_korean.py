"""Clean Korean-English sentence pairs and write them in both directions.

Reads   data/01_raw/03_korean_english/*/ : {"en", "ko"}
Writes  data/02_refined/01_english_korean/{en_to_ko,ko_to_en}.jsonl : {"source", "target", "direction", "origin"}

    python script/refine/refine_01_english_korean.py --model tiny
"""

from __future__ import annotations

import re
import sys
from collections import Counter

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.stage import Input, Stage

FORMAT = 1
SHORTEST, LONGEST = 5, 500  # characters a side
# Korean characters over English ones; a faithful pair lies near 0.5, and short sentences vary more.
RATIO = (0.15, 1.5)
HANGUL, LATIN = re.compile("[가-힣]"), re.compile("[A-Za-z]")
MOSTLY = 0.5  # share of a side's letters that must be of its own script


def drop_reason(en: str, ko: str) -> str | None:
    """Why a cleaned pair is not used, or None."""
    if not en or not ko:
        return "empty_side"
    if en == ko:
        return "untranslated_copy"
    hangul_ko, latin_ko = len(HANGUL.findall(ko)), len(LATIN.findall(ko))
    hangul_en, latin_en = len(HANGUL.findall(en)), len(LATIN.findall(en))
    if hangul_ko < MOSTLY * (hangul_ko + latin_ko) or not hangul_ko:
        return "not_korean"
    if latin_en < MOSTLY * (hangul_en + latin_en) or not latin_en:
        return "not_english"
    if min(len(en), len(ko)) < SHORTEST:
        return "too_short"
    if max(len(en), len(ko)) > LONGEST:
        return "too_long"
    if not RATIO[0] <= len(ko) / len(en) <= RATIO[1]:
        return "length_ratio"
    return None


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "refine_01_english_korean")
    stage = Stage(
        "refine_01_english_korean",
        paths,
        outputs=[paths.pairs],
        inputs=[Input("sentence pairs", paths.raw_pairs, repair=paths.command("download/download_01_english_korean"))],
        settings={"shortest": SHORTEST, "longest": LONGEST, "ratio": list(RATIO)},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code

    from medgemma_korean.text.clean import normalise_line

    with stage.work() as folder:
        counts: Counter[str] = Counter()
        kept: dict[tuple[str, str], str] = {}
        for file in records.row_files(paths.raw_pairs):
            for number, row in enumerate(records.read_rows(file), 1):
                sides = row.get("en", row.get("english")), row.get("ko", row.get("non_english"))
                if not all(isinstance(side, str) for side in sides):
                    raise PipelineError(f'{show(file)}, row {number}: needs the texts "en" and "ko"')
                counts["read"] += 1
                en, ko = map(normalise_line, sides)
                if reason := drop_reason(en, ko):
                    counts[reason] += 1
                elif (en, ko) in kept:
                    counts["exact_duplicate"] += 1
                else:
                    kept[en, ko] = file.parent.name
                    counts["kept"] += 1
        if not kept:
            raise PipelineError(f"{show(paths.raw_pairs)}: no usable pair of {counts['read']}; {dict(counts)}")
        out = folder / paths.pairs.name
        for direction in ("en_to_ko", "ko_to_en"):
            records.write_jsonl(
                out / f"{direction}.jsonl",
                (
                    {
                        "source": en if direction == "en_to_ko" else ko,
                        "target": ko if direction == "en_to_ko" else en,
                        "direction": direction,
                        "origin": origin,
                    }
                    for (en, ko), origin in kept.items()
                ),
            )
        log.info("%s", cli.table([[k, f"{n:,}"] for k, n in counts.items()], ["sentence pairs", "number"]))
        stage.complete(counts=dict(counts), metric=f"{len(kept):,} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

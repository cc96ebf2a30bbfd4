"""Clean Korean-English sentence pairs and write them in both directions.

Reads   data/01_raw/03_korean_english/*/ : {"en", "ko"}, or {"english", "non_english"} as sentence-transformers has it
Writes  data/02_refined/01_english_korean/{en_to_ko,ko_to_en}.jsonl : {"source", "target", "direction", "origin"}

    python script/refine/refine_01_english_korean.py --model tiny
"""

from __future__ import annotations

import html
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.stage import Input, Stage

FORMAT = 3
COLUMNS = (("en", "english"), ("ko", "korean", "non_english"))  # ours, then others'
SHORTEST, LONGEST = 5, 500  # characters a side
# Korean characters over English ones, from an English length on. A faithful pair lies near 0.5, and short sentences
# vary most ("I won!" is 1.17, "You're miserable, aren't you?" 0.17). Of 3,523 real pairs the wider bounds alone kept 20
# more; read by eye, 15 of them give another sentence, a half of it, or much besides.
RATIO = ((0, 0.15, 1.5), (40, 0.2, 1.0))
HANGUL, LATIN = re.compile("[가-힣]"), re.compile("[A-Za-z]")
MOSTLY = 0.5  # share of a side's letters that must be of its own script
# Names and titles that Korean quotes in English: "질병관리본부(Centers for Disease Control and Prevention)".
QUOTED = re.compile(r"""\([^()가-힣]*\)|"[^"가-힣]*"|“[^”가-힣]*”""")
# Labels of a news page with a dictionary beside it. Sentences about 사전, 독해 or TOEIC are none.
FURNITURE = re.compile(
    "사전 약어표|독해설명|##https?:|^(?:영한|한영|영영|일어|일한|한일|중국어|국어)사전$|^TOEIC 독해$"
)
# An entry of that dictionary: "link to 관련되다, 연관되다" as a whole side; behind a sentence also "negotiation 협상",
# or the Korean alone, "협력, 동의, 동시 발생". Only small letters: "mRNA 백신, DNA 백신" is a translation.
ENTRY = r"[a-z]{2,}(?: [a-z]+){0,3} [가-힣~…〔][가-힣,~…〔〕· ]{1,29}"
WHOLE_ENTRY = re.compile(rf"(?=.*[,~…〔]){ENTRY}")
LAST_ENTRY = re.compile(rf"(?<=다\.) (?:{ENTRY}|[가-힣]+(?: [가-힣]+)?(?:, [가-힣]+(?: [가-힣]+)?)+)$")
MONTH = re.compile(r" ((?:19|20)\d\d)\.\d\d?$")  # of a headline
STOP = re.compile(r"[.?!](?!\w)")
ENTITY = re.compile("&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z]{2,31});")


def clean(text: str) -> str:
    """One line of a side; `&#8212;` is a dash."""
    from medgemma_korean.text.clean import normalise_line

    return normalise_line(ENTITY.sub(lambda match: html.unescape(match[0]), text))


def clean_korean(text: str, en: str) -> str:
    """The Korean side, also without what a news page puts behind it. en: the cleaned other side."""
    ko = clean(text)
    if (month := MONTH.search(ko)) and month[1] not in en:
        ko = ko[: month.start()]
    sentences = LAST_ENTRY.sub("", ko)
    # "… 호소했다. aspirin 복용 중" is no entry where English has that sentence, too.
    return sentences if len(STOP.findall(sentences)) >= len(STOP.findall(en)) else ko


def drop_reason(en: str, ko: str) -> str | None:
    """Why a cleaned pair is not used, or None."""
    if not en or not ko:
        return "empty_side"
    if FURNITURE.search(ko):
        return "page_furniture"
    if WHOLE_ENTRY.fullmatch(ko) and "," not in en:  # "aspirin 알레르기, 천식" translates a list
        return "glossary"
    shorter, longer = sorted((en.casefold(), ko.casefold()), key=len)
    if shorter == longer or (len(shorter) >= SHORTEST and shorter in longer):
        return "untranslated_copy"
    unquoted = QUOTED.sub("", ko)
    hangul_ko, latin_ko = len(HANGUL.findall(ko)), len(LATIN.findall(unquoted))
    hangul_en, latin_en = len(HANGUL.findall(en)), len(LATIN.findall(en))
    if hangul_ko < MOSTLY * (hangul_ko + latin_ko) or not hangul_ko:
        return "not_korean"
    if latin_en < MOSTLY * (hangul_en + latin_en) or not latin_en:
        return "not_english"
    if min(len(en), len(ko)) < SHORTEST:
        return "too_short"
    if max(len(en), len(ko)) > LONGEST:
        return "too_long"
    least, most = next(bounds for length, *bounds in reversed(RATIO) if len(en) >= length)
    return None if least * len(en) <= len(ko) and len(unquoted) <= most * len(en) else "length_ratio"


def read_pairs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(English, Korean, source folder) of all raw pairs. Raises PipelineError with file and row."""
    for file in records.row_files(folder):
        origin = file.relative_to(folder).parts[0] if file.parent != folder else folder.name
        for number, row in enumerate(records.read_rows(file), 1):
            sides = [next((row[name] for name in names if name in row), None) for names in COLUMNS]
            if not all(isinstance(side, str) for side in sides):
                raise PipelineError(
                    f'{show(file)}, row {number}: needs the texts "en" and "ko"; the row has {", ".join(row)}'
                )
            yield sides[0], sides[1], origin


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "refine_01_english_korean")
    stage = Stage(
        "refine_01_english_korean",
        paths,
        outputs=[paths.pairs],
        inputs=[Input("sentence pairs", paths.raw_pairs, repair=paths.command("download/download_01_english_korean"))],
        settings={"shortest": SHORTEST, "longest": LONGEST, "ratio": RATIO},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code

    with stage.work() as folder:
        counts: Counter[str] = Counter()
        kept: dict[tuple[str, str], str] = {}
        for *sides, origin in read_pairs(paths.raw_pairs):
            counts["read"] += 1
            en = clean(sides[0])
            ko = clean_korean(sides[1], en)
            if reason := drop_reason(en, ko):
                counts[reason] += 1
            elif (en, ko) in kept:
                counts["exact_duplicate"] += 1
            else:
                kept[en, ko] = origin
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
        rows = [[k, f"{n:,}", f"{n / counts['read']:.1%}"] for k, n in counts.items()]
        log.info("%s", cli.table(rows, ["sentence pairs", "number", "share"]))
        stage.complete(counts=dict(counts), metric=f"{len(kept):,} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

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

FORMAT = 4
COLUMNS = (("en", "english"), ("ko", "korean", "non_english"))  # ours, then others'
SHORTEST, LONGEST = 5, 500  # characters a side
# Korean characters over English ones, from an English length on. A faithful pair lies near 0.5, and short sentences
# vary most ("I won!" is 1.17, "You're miserable, aren't you?" 0.17). Of 3,523 real pairs the wider bounds alone kept 20
# more; read by eye, 15 of them give another sentence, a half of it, or much besides.
RATIO = ((0, 0.15, 1.5), (40, 0.2, 1.0))
HANGUL, LATIN = re.compile("[가-힣]"), re.compile("[A-Za-z]")
MOSTLY = 0.5  # share of a side's letters, of every script, that must be of its own
# A side needs so many letters, and so many of its characters: "BP 120/80" is a translation, "12345 67890 x" is none.
FEWEST_LETTERS, LETTER_SHARE = 2, 0.2
# Small words of English, and of languages that write with the same letters. Of the second kind only those count that
# medical English does not borrow ("per os", "et al", "in vivo"); it borrows articles with names ("Gilles de la
# Tourette", "café au lait"), so they count beside others. Of 3,400 real pairs the rule drops none.
ENGLISH = frozenset(
    "the of to and or is are was were be been being you it he she they we i me him us them that this these those have "
    "has had not no for with at by from on in as an a if but so than then there here what who when where why how which "
    "while do does did done can could will would shall should may might must my your his her its our their all any "
    "some one two more most very just only up out about into over after before because between again now never always "
    "too please let go get got".split()
)
FOREIGN = frozenset(
    "je tu il elle nous vous ils une est sont suis dans pour avec sur pas qui que mon mes ne "
    "ich wir er ihr das und nicht ist ein eine einen mit auf für habe haben zu den dem von "
    "los las por para con yo muy está esta pero gli della sono che uno não uma sem ik heb een niet dat het voor".split()
)
FOREIGN_ARTICLES = frozenset("le la les el de des du au aux der die les en al di del da do et non ma".split()) - ENGLISH
WORD = re.compile(r"[^\W\d_]+")
# Names and titles that Korean quotes in English: "질병관리본부(Centers for Disease Control and Prevention)".
QUOTED = re.compile(r"""\([^()가-힣]*\)|"[^"가-힣]*"|“[^”가-힣]*”""")
# Labels of a news page with a dictionary beside it. Sentences about 사전, 독해 or TOEIC are none.
FURNITURE = re.compile(
    "사전 약어표|독해설명|##https?:|^(?:영한|한영|영영|일어|일한|한일|중국어|국어)사전$|^TOEIC 독해$"
)
# An entry of that dictionary: "link to 관련되다, 연관되다" as a whole side; behind a sentence also "negotiation 협상",
# or the Korean alone, "협력, 동의, 동시 발생". Only small letters: "mRNA 백신, DNA 백신" is a translation.
ENTRY = r"[a-z]{2,}(?: [a-z]+){0,3} [가-힣~…〔][가-힣,~…〔〕· ]{1,29}"
SURE_ENTRY, LISTED_ENTRY = re.compile(rf"(?=.*[~…〔]){ENTRY}"), re.compile(rf"(?=.*,){ENTRY}")
LIST = re.compile(r",|\b(?:and|or)\b")
LAST_ENTRY = re.compile(rf"(?<=다\.) (?:{ENTRY}|[가-힣]+(?: [가-힣]+)?(?:, [가-힣]+(?: [가-힣]+)?)+)$")
MONTH = re.compile(r" ((?:19|20)\d\d)\.\d\d?$")  # of a headline
LAST_OF_LIST = re.compile(r"(?:[,:]|\b(?:and|or)) (?:[\w-]+ ){0,2}[\w-]+\W*$")
USUAL_RATIO = 0.5  # of a faithful pair
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
    if not (entry := LAST_ENTRY.search(ko)):
        return ko
    sentences = ko[: entry.start()]
    # "… 호소했다. aspirin 복용 중" is no entry where English has that sentence, too; "… 같다. 두통, 발열" is none where
    # English ends in such a list. It may also end in ", he said": there the length decides.
    whole = len(STOP.findall(sentences)) >= len(STOP.findall(en))
    return sentences if whole and (not LAST_OF_LIST.search(en) or _off(sentences, en) < _off(ko, en)) else ko


def _off(ko: str, en: str) -> float:
    """How many times too long or too short a Korean side is."""
    times = max(len(ko), 1) / max(len(en), 1) / USUAL_RATIO
    return max(times, 1 / times)


def is_foreign(en: str) -> bool:
    """Whether the small words and accents of a side in Latin letters speak for another language than English."""
    first, *others = WORD.findall(en) or [""]
    # Names keep their accents and articles in English.
    words = {first.lower(), *(word for word in others if word[0].islower())}
    signs = {word for word in words if word in FOREIGN or word in FOREIGN_ARTICLES or not word.isascii()}
    english = {word.lower() for word in (first, *others)} & ENGLISH
    return len(signs) > len(english) and len(signs) >= (2 if words & FOREIGN else 3)


def drop_reason(en: str, ko: str) -> str | None:
    """Why a cleaned pair is not used, or None."""
    if not en or not ko:
        return "empty_side"
    if FURNITURE.search(ko):
        return "page_furniture"
    # "aspirin 알레르기, 천식" translates a list.
    if SURE_ENTRY.fullmatch(ko) or (LISTED_ENTRY.fullmatch(ko) and not LIST.search(en)):
        return "glossary"
    shorter, longer = sorted((en.casefold(), ko.casefold()), key=len)
    if shorter == longer or (len(shorter) >= SHORTEST and shorter in longer):
        return "untranslated_copy"
    if min(len(en), len(ko)) < SHORTEST:
        return "too_short"
    unquoted = QUOTED.sub("", ko)
    if not _mostly(len(HANGUL.findall(ko)), ko, _without_names(unquoted, en)):
        return "not_korean"
    if not _mostly(len(LATIN.findall(en)), en, en) or is_foreign(en):
        return "not_english"
    if max(len(en), len(ko)) > LONGEST:
        return "too_long"
    least, most = next(bounds for length, *bounds in reversed(RATIO) if len(en) >= length)
    return None if least * len(en) <= len(ko) and len(unquoted) <= most * len(en) else "length_ratio"


def _without_names(ko: str, en: str) -> str:
    """The Korean side without what it takes over from the other one, where most of its words are Korean.

    "metformin 복용 후 저혈당" has more Latin letters than Korean ones; "competition 경쟁" is a dictionary's entry.
    """
    words, taken = ko.split(), {word.casefold() for word in WORD.findall(en)}
    names = [word for word in WORD.findall(ko) if word.isascii() and word.casefold() in taken]
    if 2 * len(names) > sum(bool(HANGUL.search(word)) for word in words):
        return ko
    return WORD.sub(lambda match: "" if match[0] in names else match[0], ko)


def _mostly(own: int, side: str, unquoted: str) -> bool:
    """Whether a side with so many letters of its own script is in its language."""
    letters = sum(map(str.isalpha, side))
    foreign = sum(map(str.isalpha, unquoted)) - own
    characters = sum(not c.isspace() for c in side)
    return own >= max(FEWEST_LETTERS, MOSTLY * (own + foreign)) and letters >= LETTER_SHARE * characters


def read_pairs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(English, Korean, source folder) of all raw pairs. Raises PipelineError with file and row."""
    for file in records.row_files(folder):
        origin = file.relative_to(folder).parts[0] if file.parent not in (folder, folder.parent) else folder.name
        for number, row in enumerate(records.read_rows(file), 1):
            sides = [next((row[name] for name in names if name in row), None) for names in COLUMNS]
            if not all(isinstance(side, str) for side in sides):
                raise PipelineError(
                    f'{show(file)}, row {number}: needs the texts "en" and "ko"; the row has {", ".join(row)}; mend it'
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
            raise PipelineError(f"{show(paths.raw_pairs)}: no usable pair ({cli.listed(counts)}); bring others")
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

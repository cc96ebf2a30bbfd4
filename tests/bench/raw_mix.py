"""Raw Korean text of the real mix's shape from a seed: 40 % NamuWiki mark-up, 15 % Wikipedia, 45 % web pages.

    truth = make(folder, megabytes=200, seed=1)     # writes folder/01_raw/, which --data-dir takes, and truth.json
    score(truth, texts)                             # what a program found of all that was planted

Sentences are the sample's with most words exchanged for others of the same ending, so that no document resembles
another. How often each mark stands in a NamuWiki page, how long pages are, and what the web adds (addresses, emoticons,
advertisements, menus) follows real pages. Every document holds its number ("제17호"), by which programs are scored:
exact copies, copies with 5 % of the words changed, and pages that quote an exam item are planted.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from medgemma_korean.text.filters import drop_reasons

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
SHARES = {"namu_wiki": 0.40, "wikipedia-korean": 0.15, "c4_korean": 0.45}  # of the bytes
# Characters of a page: median and spread of a log-normal distribution, and the most.
LENGTHS = {"namu_wiki": (2200, 1.1, 120_000), "wikipedia-korean": (700, 0.9, 30_000), "c4_korean": (800, 0.8, 20_000)}
FILE_MB, GROUP_ROWS = 40, 1000
EXCHANGED = 0.6  # share of a sentence's words
EXACT, NEAR, NEAR_WORDS = 0.015, 0.02, 0.05  # share of documents copied; share of words changed in a near copy
EXAM_ITEMS = {"train": 3000, "dev": 1000, "test": 3000}
QUOTED = 300  # exam items that stand in web pages and articles
BATCH = 4000  # sentences made at a time

# Mark-up of one word and how often it occurs; counted on real pages, a kilobyte of which has about 90 words.
WORD_MARKS = (
    (0.024, "[[{0}]]"),
    (0.013, "[[{0}|{1}]]"),
    (0.016, "'''{0}'''"),
    (0.013, "{{{{{{#ff4500 {0}}}}}}}"),
    (0.002, "{{{{{{+1 {0}}}}}}}"),
    (0.0006, "~~{0}~~"),
    (0.005, "{0}[* {1}에서 {0} 참고. [[{1}]]에는 다르게 나온다.]"),
    (0.007, "{0}[br]"),
    (0.003, "[[파일:{0}.png|width=300]]"),
    (0.0005, "[youtube({0})]"),
    (0.001, "[[https://example.org/{1}?id=12|{0}]]"),
)
# Of one sentence: headings, table rows, lists, boxes, quotes.
LINE_MARKS = (
    (0.06, "\n== {0} ==\n{1}"),
    (0.10, "\n|| {0} ||<#eeeeee><-3> [[{0}]] || {1} || 1987년 4월 ||<|2> {0} || 12,345 ||"),
    (0.06, "\n||<-2><tablealign=right><table bordercolor=#1d3a6b><bgcolor=#ffffff> {1} ||<width=30%> {0} ||"),
    (0.05, "\n * {1}"),
    (0.02, '\n{{{{{{#!wiki style="text-align:center; margin:5px"\n{1}}}}}}}\n'),
    (0.01, "\n> {1}\n"),
    (0.002, "\n[include(틀:상세 내용, 문서명={0})]\n{1}"),
    (0.25, "{1}\n"),
    (0.10, "{1}\n\n"),
)
ARTICLE_MARKS = ((0.015, "{0}({1})"), (0.02, "1987년 {0}"), (0.01, "{0}(Kim {1}, 3.5%)"))
WEB_MARKS = (
    (0.008, "{0}ㅋㅋㅋ"),
    (0.004, "{0}ㅠㅠ"),
    (0.003, "{0}~~"),
    (0.002, "{0}^^"),
    (0.002, "{0}…"),
    (0.001, "{0}😊"),
    (0.001, "https://www.example.com/board/{1}?no=7 {0}"),
    (0.0005, "{0}@example.com"),
    (0.0005, "010-1234-5678 {0}"),
)
ADVERTS = ("무료 상담", "카톡 문의", "당일 배송", "특가 할인", "선착순 마감", "최저가 보장", "예약 문의", "할인 쿠폰")
MENUS = ("로그인", "회원가입", "이용약관", "개인정보 처리방침", "고객센터", "사이트맵", "장바구니", "글쓰기", "이전글")
ENGLISH = "The patients were followed for one year after the operation, and all of them returned to work. "


@dataclass
class Truth:
    """What was planted, by the numbers of documents. exact, near: copy -> original; a copy shares an exact one's."""

    documents: int = 0
    bytes: int = 0
    plain: list[int] = field(default_factory=list)  # nothing is wrong with them: each must stay, once
    exact: dict[int, int] = field(default_factory=dict)  # original -> how many copies of it
    near: dict[int, int] = field(default_factory=dict)
    exam: dict[int, str] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)  # by what is wrong with them


class Writer:
    """Sentences and pages from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        texts = [row["text"] for name in ("wikipedia-korean", "c4_korean") for row in _rows("01_raw/00_korean/" + name)]
        texts += [row["text"] for row in _rows("pretrain/ko")]
        texts = [text for text, why in zip(texts, drop_reasons(texts, "ko"), strict=True) if not why]
        sentences = [
            s.split()
            for text in texts
            for s in re.split(r"(?<=[.?!])\s+|\n+", text)
            if re.match("[가-힣][^\\[{<|=]*$", s)
        ]
        self.sentences = [words for words in sentences if 4 <= len(words) <= 30]
        flat = list(itertools.chain.from_iterable(self.sentences))
        real = sorted(set(flat))
        # New words: the beginning of one and the end of another.
        heads = [word[:2] for word in real if len(word) > 2]
        drawn = self.rng.integers(len(heads), size=(len(real), 8)).tolist()
        made = {heads[i] + word[-2:] for word, row in zip(real, drawn, strict=True) for i in row}
        vocabulary = sorted(made.union(real), key=lambda word: (word[-1], word))
        self.vocabulary = np.array(vocabulary, dtype=object)
        number = {word: i for i, word in enumerate(vocabulary)}
        self.flat = np.array([number[word] for word in flat])
        lengths = np.array([len(words) for words in self.sentences])
        self.starts, self.lengths = np.cumsum(lengths) - lengths, lengths
        endings = np.array([word[-1] for word in vocabulary])
        _, first, inverse, size = np.unique(endings, return_index=True, return_inverse=True, return_counts=True)
        self.first, self.size = first[inverse], size[inverse]  # where the words of the same ending stand, and how many

    def words(self, number: int) -> np.ndarray:
        """Words at random, object [number]."""
        return self.vocabulary[self.rng.integers(len(self.vocabulary), size=number)]

    def make(self, number: int, marks: tuple[tuple[float, str], ...] = (), exchanged: float = EXCHANGED) -> list[str]:
        """Sentences, some of whose words are marked up."""
        chosen = self.rng.integers(len(self.sentences), size=number)
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        words = self.flat[np.repeat(self.starts[chosen] - (ends - lengths), lengths) + np.arange(total)]
        drawn = self.first[words] + (self.rng.random(total) * self.size[words]).astype(int)
        written = self.vocabulary[np.where(self.rng.random(total) < exchanged, drawn, words)].tolist()
        for at, pattern in self._draw(total, marks):
            written[at] = pattern.format(written[at], written[at - 1].strip(".,"))
        return [" ".join(written[low:high]) for low, high in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]

    def _draw(self, total: int, marks: tuple[tuple[float, str], ...]) -> Iterator[tuple[int, str]]:
        """(position, pattern) of what is marked."""
        edges = np.cumsum([share for share, _ in marks])
        which = np.searchsorted(edges, self.rng.random(total), side="right") if marks else np.empty(0, dtype=int)
        for at in np.flatnonzero(which < len(marks)).tolist():
            yield at, marks[which[at]][1]

    def pages(self, source: str) -> Iterator[str]:
        """Pages of a source without end."""
        median, spread, most = LENGTHS[source]
        inline = {"namu_wiki": WORD_MARKS, "c4_korean": WEB_MARKS}.get(source, ARTICLE_MARKS)
        lines = LINE_MARKS if source == "namu_wiki" else ((0.1, "{1}\n"), (0.05, "{1}\n\n"))
        left: list[str] = []
        while True:
            length = min(median * np.exp(spread * self.rng.standard_normal()), most)
            page: list[str] = []
            while length > 0:
                if not left:
                    left = self.make(BATCH, inline)
                    titles = self.words(BATCH).tolist()
                    for at, pattern in self._draw(BATCH, lines):
                        left[at] = pattern.format(titles[at].strip(".,"), left[at])
                page.append(left.pop())
                length -= len(page[-1])
            yield " ".join(page)

    def edited(self, text: str) -> str:
        """A copy with NEAR_WORDS of its words changed; mark-up is left as it is."""
        words = text.split(" ")
        plain = [at for at, word in enumerate(words) if re.fullmatch("[가-힣]+[.,]?", word)]
        number = max(1, round(NEAR_WORDS * len(words)))
        others = self.words(number).tolist()
        chosen = self.rng.choice(plain, size=min(number, len(plain)), replace=False).tolist()
        for at, other in zip(chosen, others, strict=False):
            words[at] = other
        return " ".join(words)

    def exam_item(self, number: int) -> dict:
        question = " ".join(self.make(3, exchanged=1.0)) + " 옳은 것은?"  # as far from all pages as real exams are
        options = [" ".join(words) for words in np.split(self.words(15), 5)]
        about = {"subject": "doctor", "year": 2000 + number % 20, "period": 1, "q_number": number}
        return about | {"question": question} | dict(zip("ABCDE", options, strict=True)) | {"answer": number % 5 + 1}


def _rows(folder: str) -> Iterator[dict]:
    for file in sorted((SAMPLE / folder).glob("*.jsonl")):
        yield from map(json.loads, filter(None, file.read_text(encoding="utf-8").split("\n")))


# How a page quotes an exam item: as printed, and with other spacing and punctuation.
QUOTES = (
    lambda question, options: f"{question}\n" + "\n".join(options),
    lambda question, options: f"{question}\n" + "\n".join(f"{m} {o}" for m, o in zip("①②③④⑤", options, strict=True)),
    lambda question, options: (question + "".join(options)).replace(" ", ""),
    lambda question, options: f"문제: “{question}”".replace(" ", "  ").replace(".", "…") + " / ".join(options),
    lambda question, options: "\n".join(f"{n}) {o}" for n, o in enumerate([question, *options])).replace(",", " ·"),
    lambda question, options: question.replace(" ", "\n") + ", ".join(options),
)


def make(folder: Path, megabytes: float, seed: int = 1) -> Truth:
    """Write folder/01_raw and folder/truth.json; the same bytes for the same arguments."""
    import pyarrow
    import pyarrow.parquet

    writer, truth = Writer(seed), Truth()
    exams = folder / "01_raw" / "02_kor_med_test"
    exams.mkdir(parents=True)
    items = [(split, writer.exam_item(i)) for split, number in EXAM_ITEMS.items() for i in range(number)]
    for split in EXAM_ITEMS:
        lines = [json.dumps(item, ensure_ascii=False) for where, item in items if where == split]
        (exams / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_out = [item for split, item in items if split != "train"]
    quoted = [held_out[i] for i in writer.rng.permutation(len(held_out))[:QUOTED]]
    for source, share in SHARES.items():
        # Few pages hold exam items, whatever the size, and each source but the mark-up has half of them.
        mine = [] if source == "namu_wiki" else [quoted.pop() for _ in range(QUOTED // 2)]
        texts = _documents(writer, truth, source, share * megabytes * 1e6, mine)
        place = folder / "01_raw" / "00_korean" / source
        place.mkdir(parents=True)
        for number, group in enumerate(_groups(texts, FILE_MB * 1e6)):
            table = pyarrow.table({"text": group})
            pyarrow.parquet.write_table(table, place / f"train-{number:05}.parquet", row_group_size=GROUP_ROWS)
    (folder / "truth.json").write_text(json.dumps(asdict(truth)), encoding="utf-8")
    return truth


def load(folder: Path) -> Truth:
    about = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    for name in ("exact", "near", "exam"):
        about[name] = {int(key): value for key, value in about[name].items()}
    return Truth(**about)


def _groups(texts: Iterable[str], size: float) -> Iterator[list[str]]:
    group, room = [], size
    for text in texts:
        group.append(text)
        room -= len(text.encode())
        if room < 0:
            yield group
            group, room = [], size
    if group:
        yield group


def _documents(writer: Writer, truth: Truth, source: str, size: float, items: list[dict]) -> Iterator[str]:
    """The numbered documents of a source, good ones and planted ones, of `size` bytes together."""
    rng, copies, done = writer.rng, [], 0
    every = size / (len(items) + 1)  # bytes between two quotations
    quote = itertools.cycle(QUOTES)
    for page in writer.pages(source):
        if done >= size:
            return
        truth.documents += 1
        number, kind = truth.documents, rng.random()
        text = f"제{number}호 {page}"
        if copies and kind < EXACT + NEAR:
            original, first = copies.pop(int(rng.integers(len(copies))))
            if kind < EXACT:
                truth.exact[original] = truth.exact.get(original, 0) + 1
                text = first
            else:
                truth.near[number] = original
                text = writer.edited(first).replace(f"제{original}호", f"제{number}호", 1)
        elif items and done > size - every * len(items):
            item = items.pop()
            half = len(page) // 2
            printed = next(quote)(item["question"], [item[key] for key in "ABCDE"])
            text = f"제{number}호 {page[:half]}\n{printed}\n{page[half:]}"
            truth.exam[number] = f"{item['year']}/{item['q_number']}"
        elif source == "c4_korean" and kind > 0.90:
            reason, text = _unwanted(writer, number, page)
            truth.dropped.setdefault(reason, []).append(number)
        elif len(page) > 600:  # without its mark-up a shorter page may be too short
            truth.plain.append(number)
            if rng.random() < 2 * (EXACT + NEAR):
                copies.append((number, text))
        size_here = len(text.encode())
        done += size_here
        truth.bytes += size_here
        yield text


def _unwanted(writer: Writer, number: int, page: str) -> tuple[str, str]:
    """Why a web page is to be dropped, and the page."""
    kind = writer.rng.random()
    if kind < 0.5:
        page = page[:600]
        parts = [page[i : i + 80] for i in range(0, len(page), 80)]
        phrases = [str(phrase) for phrase in writer.rng.choice(ADVERTS, size=len(parts) + 4)]
        return "advertisement", f"제{number}호 " + " ".join(map("{} {}".format, phrases, [*parts, "", "", "", ""]))
    if kind < 0.7:
        return "boilerplate", f"제{number}호 " + " | ".join(MENUS) + "\n" + page[:200]
    if kind < 0.85:
        return "too_short", f"제{number}호 {page[:60]}"
    return "korean_ratio", f"제{number}호 {ENGLISH * (2 + len(page) // 100)}"


NUMBER = re.compile("제([0-9]+)호")


def score(truth: Truth, texts: Iterable[str]) -> dict[str, float]:
    """How much of what was planted is gone from the texts that a program kept, and how much else with it.

    A number that is not in the text's first 200 characters is not found; no cleaning moves it there.
    """
    kept = Counter(int(found[1]) for text in texts if (found := NUMBER.search(text[:200])))
    copies = sum(truth.exact.values())
    left = sum(kept[original] - 1 for original in truth.exact if kept[original] > 1)
    both = sum(1 for copy, original in truth.near.items() if kept[copy] and kept[original])
    # Of an original and its near copy either may stay.
    partners = {original: copy for copy, original in truth.near.items()}
    lost = [n for n in truth.plain if not kept[n] and not kept[partners.get(n, 0)]]
    unwanted = [number for numbers in truth.dropped.values() for number in numbers]
    return {
        "exact copies": 1 - left / max(copies, 1),
        "near copies": 1 - both / max(len(truth.near), 1),
        "exam items": 1 - sum(1 for number in truth.exam if kept[number]) / max(len(truth.exam), 1),
        "unwanted pages": 1 - sum(1 for number in unwanted if kept[number]) / max(len(unwanted), 1),
        "lost": len(lost),
        "plain": len(truth.plain),
    }

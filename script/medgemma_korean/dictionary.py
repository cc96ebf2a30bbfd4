"""The medical dictionary: cleaned terms, several senses kept, and the symbol table (`dictionary_files` reads)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import records
from medgemma_korean.text.clean import normalise_line

DETAIL = re.compile(r"(?:^|\s*\n)\s*세부설명\s*:\s*")
SYMBOLS = Path(__file__).with_name("symbols.json")


@dataclass
class Entry:
    """One raw entry. where: file and line, for messages."""

    term: str
    definition: str
    source: str
    category: str
    where: str


@dataclass
class Merged:
    """A refined term with its senses in order of source."""

    term: str
    senses: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        text = self.senses[0]
        if len(self.senses) > 1:
            text = " ".join(f"{i}. {sense}" for i, sense in enumerate(self.senses, 1))
        return {
            "term": self.term,
            "definition": text,
            "senses": len(self.senses),
            "source": self.sources,
            "category": self.categories,
        }


# cleaning -----------------------------------------------------------------------------------------------

_NUMBERED = re.compile(r"(?:^|\s)(\d{1,2})\.(?!\d)\s*(?=\S)")  # "1. 폐포", not "1.5 테슬라"
_GLOSS = re.compile(r"^(?P<term>[^-–—:]{1,40}?)\s*[-–—:]\s*(?P<gloss>.{8,})$")
_SENTENCE = re.compile(r"(?:다|함|음|임|것|[은는을를의된한한])\.?(?:\s|$)")


def clean_term(term: str) -> tuple[str, str]:
    """A dictionary headword without numbering, and the gloss that stood inside it ("" where there was none).

    `1. 조 치조 2. 폐포` -> `조/치조/폐포`; `1. 첨단농양-기관의 첨단에 위치한 농양. 2. 근첨농양` ->
    `첨단농양/근첨농양` with its gloss. Unnumbered terms keep spaces, brackets and Hanja: `간 스캔`, `(골)수강`.
    """
    term = normalise_line(term)
    marks = list(_NUMBERED.finditer(term))
    if not marks or marks[0].start() != 0 or marks[0].group(1) != "1":
        return term, ""
    pieces, glosses = [], []
    bounds = [m.end() for m in marks]
    ends = [m.start() for m in marks[1:]] + [len(term)]
    for start, end in zip(bounds, ends, strict=True):
        piece = term[start:end].strip()
        gloss = _GLOSS.match(piece)
        if gloss and _is_gloss(gloss["gloss"]):
            glosses.append(gloss["gloss"].strip())
            piece = gloss["term"]
        pieces += piece.split()
    return "/".join(dict.fromkeys(pieces)), " ".join(glosses)


def _is_gloss(text: str) -> bool:
    """A phrase or sentence behind a hyphen, not the rest of a hyphenated term (`α1-항트립신 결핍증`)."""
    return text.endswith(".") or text.count(" ") >= 2 or _SENTENCE.search(text) is not None


def clean_definition(definition: str) -> str:
    """One line; the Korean detail follows the equivalent after " - "."""
    return normalise_line(DETAIL.sub(" - ", definition.strip())).strip(" -")


def merge(entries: Iterable[Entry], veterinary: bool = True) -> tuple[list[Merged], Counter[str]]:
    """Clean and merge entries by term, first appearance first; no sense is lost. Returns terms and drop reasons."""
    merged: dict[str, Merged] = {}
    counts: Counter[str] = Counter()
    for entry in entries:
        counts["read"] += 1
        if entry.category == "veterinary" and not veterinary:
            counts["dropped: veterinary"] += 1
            continue
        term, gloss = clean_term(entry.term)
        definition = clean_definition(entry.definition)
        if gloss:
            definition = f"{definition} - {gloss}" if definition else gloss
        if not term:
            counts["dropped: empty term"] += 1
            continue
        if not definition:
            counts["dropped: empty definition"] += 1
            continue
        if definition == term:
            counts["dropped: definition equals term"] += 1
            continue
        target = merged.setdefault(term, Merged(term))
        known = {sense.casefold() for sense in target.senses}
        # A detailed sense that begins with the bare equivalent already holds it.
        if definition.casefold() in known or any(s.startswith(f"{definition.casefold()} - ") for s in known):
            counts["dropped: same sense"] += 1
        elif bare := [i for i, s in enumerate(target.senses) if definition.casefold().startswith(f"{s.casefold()} - ")]:
            target.senses[bare[0]] = definition
            counts["dropped: same sense"] += 1
        else:
            target.senses.append(definition)
        for value, values in ((entry.source, target.sources), (entry.category, target.categories)):
            if value not in values:
                values.append(value)
    kept = list(merged.values())
    counts["kept terms"] = len(kept)
    counts["kept senses"] = sum(len(m.senses) for m in kept)
    return kept, counts


def reversible(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Entries whose definition names exactly one term, so that it can be asked the other way round."""
    uses = Counter(row["definition"] for row in rows)
    return [row for row in rows if uses[row["definition"]] == 1 and row.get("senses", 1) == 1]


# symbols ------------------------------------------------------------------------------------------------


def count_symbols(texts: Iterable[str]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The known symbols that occur in the texts, most frequent first, with meaning and count; and the unknown ones.

    Unknown are characters of symbol categories (So, Sm, No, Sk) that the table does not explain: reported, not dropped.
    """
    from unicodedata import category

    meanings = {row["term"]: row["definition"] for row in records.read_json(SYMBOLS)}
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(c for c in text if not c.isalnum() or c in meanings)
    known = [(c, n) for c, n in counts.items() if c in meanings]
    rows = [
        {"term": c, "definition": meanings[c], "count": n}
        for c, n in sorted(known, key=lambda item: (-item[1], item[0]))
    ]
    unknown = {c: n for c, n in counts.items() if c not in meanings and category(c) in ("So", "Sm", "No", "Sk")}
    return rows, Counter(unknown)

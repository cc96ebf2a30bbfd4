"""The medical dictionary: cleaned terms, several senses kept, and the symbol table (`dictionary_files` reads)."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medgemma_korean import records
from medgemma_korean.text.clean import normalise_line

DETAIL = re.compile(r"(?:^|\s*\n)\s*세부설명\s*:\s*")
KCD = "한국표준질병사인분류"  # as the dictionaries themselves name a code, in the detail
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
    """A refined term with its definitions in order of source.

    A definition is what one entry says. A sense is one meaning: the whole definition, or each part of a numbered one.
    Senses are what is counted.
    """

    term: str
    definitions: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)

    def add(self, definition: str) -> bool:
        """Keep a definition; False where it says nothing new, as "Rabies" beside "Rabies - …" in either order."""
        new = definition.casefold()
        known = [old.casefold() for old in self.definitions]
        said = {*known, *(sense.casefold() for sense in self.senses())}
        if new in said or any(old.startswith(f"{new} - ") for old in known):
            return False
        bare = next((i for i, old in enumerate(known) if new.startswith(f"{old} - ")), None)
        if bare is None:
            self.definitions.append(definition)
            return True
        self.definitions[bare] = definition
        return False

    def senses(self) -> list[str]:
        """The definitions, those that are numbered themselves in their parts."""
        return [sense for definition in self.definitions for sense in numbered(definition) or [definition]]

    def row(self) -> dict[str, Any]:
        senses = self.senses()
        text = self.definitions[0]
        if len(self.definitions) > 1:
            text = " ".join(f"{i}. {sense}" for i, sense in enumerate(senses, 1))
        return {
            "term": self.term,
            "definition": text,
            "senses": len(senses),
            "source": self.sources,
            "category": self.categories,
            **({"aliases": self.aliases} if self.aliases else {}),
        }


# cleaning -----------------------------------------------------------------------------------------------

_WIDE = str.maketrans("（）［］〔〕＜＞＝", "()[][]<>=")
_NUMBER = re.compile(r"(?:^|\s)(\d{1,2})[.)](?!\d)(?=\s*\S)")  # "1. 폐포", not "1.5 테슬라"
_CIRCLED = re.compile("[①-⑨]")
_GLOSS = re.compile(r"^(?P<term>[^-–—:]{1,40}?)\s*[-–—:]\s*(?P<gloss>.{8,})$")
_SENTENCE = re.compile(r"(?:다|함|음|임|것|[은는을를의된한])\.?(?:\s|$)")
# What a full stop may follow: a word of two syllables or a bracket. Those of "피.씨.피." and "C.G.S단위" are no stops.
_WORD_ENDS = r"(?:(?<=[가-힣][가-힣])|(?<=[)\]]))"
_STOP_BETWEEN = re.compile(rf"{_WORD_ENDS}\.\s*(?=[가-힣(\[]{{2}})")
_STOP_AT_END = re.compile(rf"{_WORD_ENDS}\.$")
_EQUALS = re.compile(r"(?<=\S)\s*=\s*(?=[^\s\d])(?![^(]*\))")  # outside brackets
# What an export lost: all Hanja of a headword, or those of the compatibility block (`열결(列缺)` became `열결(缺)`).
_EMPTY = re.compile(r"\( ?\)|\[ ?\]|< ?>")
_HANJA = re.compile(r"([가-힣]+)\(([\u3400-\u4dbf\u4e00-\u9fff]+)\)")
# A code of the KCD behind a name: `(G01*)`, `(G30.-+)`, `(I60-I67+)`, `(Q85.8)`. It has a point or a mark, which the
# B12 of a vitamin and the T12 of a vertebra have not.
_CODE = re.compile(r"\s*\(([A-Z]\d\d(?:(?:\.[\d-]{1,3})?(?:-[A-Z]\d\d(?:\.\d)?)?[*+†]|\.[\d-]{1,3}))\)$")
_STEP = re.compile(r"^\s*(\d{1,2})[.)]\s*", re.MULTILINE)
_IN_BRACKETS = re.compile(r"\(([^()]{2,})\)")
_HANGUL = re.compile("[가-힣]")
_GROUP = re.compile(r"\[[^][]*\]|<[^<>]*>|\([^()]*\)")


class Headword(NamedTuple):
    """term: cleaned. gloss, code: the explanation and the KCD code that stood inside it. aliases: plain spellings,
    where it has variants."""

    term: str
    gloss: str = ""
    aliases: tuple[str, ...] = ()
    code: str = ""


def clean_term(raw: str) -> Headword:
    """A dictionary headword without numbering and stray punctuation.

    `1. 조 치조 2. 폐포` -> `조/치조/폐포`; `1. 첨단농양-기관의 첨단에 위치한 농양. 2. 근첨농양` ->
    `첨단농양/근첨농양` with its gloss. Synonyms on both sides of `=` or of a full stop (`팔꿈치머리. 주두`) get the
    same slash. `결핵성 수막염(G01*)` loses its code, `열결(缺)` the rest of its Hanja. All else stays: `간 스캔`,
    `간경변[증]`, `각(脚)`, also `(약의)경구복용`: "(신장의)결석" is not 결석.
    """
    term, code = _without_code(_EMPTY.sub("", normalise_line(raw).translate(_WIDE)).strip())
    if _CIRCLED.match(term):
        term = _CIRCLED.sub(lambda mark: f" {ord(mark[0]) - ord('①') + 1}. ", term).strip()
    parts = numbered(term)
    pieces, glosses = [], []
    for part in parts or [term]:
        gloss = _GLOSS.match(part) if parts else None
        if gloss and _is_gloss(gloss["gloss"]):
            glosses.append(gloss["gloss"].strip())
            part = gloss["term"]
        # Spaces separate synonyms only where numbers do too.
        for word in part.split() if parts else [part]:
            word = _IN_BRACKETS.sub(r"\1", word) if _IN_BRACKETS.fullmatch(word) else word
            pieces += _EQUALS.sub("\n", _STOP_BETWEEN.sub("\n", _STOP_AT_END.sub("", word))).split("\n")
    pieces = list(dict.fromkeys(_without_lost(piece.strip()) for piece in pieces if piece.strip()))
    term = "/".join(pieces)
    spellings = [*(pieces if len(pieces) > 1 else []), *(s for piece in pieces for s in _spellings(piece))]
    return Headword(term, " ".join(glosses), tuple(s for s in dict.fromkeys(spellings) if s != term), code)


def lost_hanja(raw: str) -> bool:
    """Whether a headword has another number of Hanja than of syllables, `열결(缺)`, or an empty bracket, `머리()`."""
    term = normalise_line(raw).translate(_WIDE)
    return _EMPTY.search(term) is not None or _without_lost(term) != term


def _without_lost(word: str) -> str:
    """The word alone where its Hanja are not one a syllable: which of them is missing cannot be told."""
    hanja = _HANJA.fullmatch(word)
    return hanja[1] if hanja and len(hanja[1]) != len(hanja[2]) else word


def _without_code(text: str) -> tuple[str, str]:
    code = _CODE.search(text)
    return (text[: code.start()], code[1]) if code and code.start() else (text, "")


def numbered(text: str) -> list[str]:
    """The parts of `1. … 2. …` without their numbers; [] for a text that does not begin with 1."""
    marks: list[re.Match[str]] = []
    for mark in _NUMBER.finditer(text):
        if int(mark[1]) == len(marks) + 1:
            marks.append(mark)
    if not marks or marks[0].start() != 0:
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]


def _is_gloss(text: str) -> bool:
    """A phrase or sentence behind a hyphen, not the rest of a hyphenated term (`α1-항트립신 결핍증`)."""
    return text.endswith(".") or text.count(" ") >= 2 or _SENTENCE.search(text) is not None


def _spellings(term: str) -> list[str]:
    """How a term with brackets is also written: without what they hold, and with it where that is sure.

    `간경변[증]` is 간경변 and 간경변증, `돈<돼지>콜레라` 돈콜레라 and 돼지콜레라, `(골)수강` 수강 and 골수강,
    `각(脚)` 각.
    """
    groups = _GROUP.findall(term)
    plain = " ".join(_GROUP.sub("", term).split())
    if not groups or not plain:
        return []
    if " " in plain:  # `기생(증) 기생생활` are two words; only Hanja or English behind a phrase belong to the whole
        behind = len(groups) == 1 and term.endswith(")") and not _HANGUL.search(groups[0])
        return [plain] if behind else []
    found = [plain]
    if "][" not in term:  # [형][정신] are alternatives
        found.append(re.sub(r"\[([가-힣]{1,2})\]", r"\1", term))
    if len(groups) == 1:
        found.append(re.sub(r"^\(([가-힣])\)|\(([증술골법상사부성물학])\)$", r"\1\2", term))
        # It replaces the syllable before it, or the whole word when that is no longer than itself.
        found.append(re.sub(r"[가-힣]<([가-힣])>|^([가-힣]+)<([가-힣]+)>", _replaced, term))
    return [spelling for spelling in found if not _GROUP.search(spelling)]


def _replaced(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    return match[3] if len(match[2]) <= len(match[3]) else match[0]


def clean_definition(definition: str, code: str = "") -> str:
    """One line; the Korean detail follows the equivalent after " - ".

    A KCD code behind the equivalent, and the headword's, become a detail: `Tuberculous meningitis(G01*)` ->
    `Tuberculous meningitis - 한국표준질병사인분류 G01*`.
    """
    equivalent, *details = map(normalise_line, DETAIL.split(definition.strip()))
    equivalent, own = _without_code(equivalent)
    if any((equivalent, *details)) and (codes := ", ".join(dict.fromkeys(filter(None, (own, code))))):
        known = details.pop() if details and details[-1].startswith(KCD) else ""
        details.append(f"{known}, {codes}" if known else f"{KCD} {codes}")
    return " - ".join(filter(None, (equivalent, *details)))


def as_one_list(definition: str) -> str:
    """Steps that stand on lines of their own, `1. …` and `2. …`, as `(1) … (2) …`: one text, not a sense each."""
    steps = len(_STEP.findall(definition))
    return _STEP.sub(r"(\1) ", definition) if steps == len(numbered(normalise_line(definition))) > 1 else definition


def same_word(term: str) -> str:
    """What spellings of a term share that differ in spaces or capitals: `좁쌀 결핵`, `좁쌀결핵`."""
    return "".join(term.split()).casefold()


def merge(entries: Iterable[Entry], veterinary: bool = True) -> tuple[list[Merged], Counter[str]]:
    """Clean and merge entries by term, first appearance first; no sense is lost. Returns terms and drop reasons.

    The first spelling of a term stays, one with other spaces or capitals becomes an alias.
    """
    merged: dict[str, Merged] = {}
    counts: Counter[str] = Counter()
    for entry in entries:
        counts["read"] += 1
        if entry.category == "veterinary" and not veterinary:
            counts["dropped: veterinary"] += 1
            continue
        term, gloss, aliases, code = clean_term(entry.term)
        # Headwords that lost their Hanja are headings of instructions, as `머리()`: how to measure it, step by step.
        text = as_one_list(entry.definition) if _EMPTY.search(entry.term.translate(_WIDE)) else entry.definition
        definition = clean_definition(text, code)
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
        target = merged.setdefault(same_word(term), Merged(term))
        if not target.add(definition):
            counts["dropped: same sense"] += 1
        for value, values in ((entry.source, target.sources), (entry.category, target.categories)):
            if value not in values:
                values.append(value)
        target.aliases += [s for s in (term, *aliases) if s != target.term and s not in target.aliases]
    kept = list(merged.values())
    counts["kept terms"] = len(kept)
    counts["kept senses"] = sum(len(m.senses()) for m in kept)
    # What balances the account: read + this = kept senses + dropped.
    if more := counts["kept senses"] - sum(len(m.definitions) for m in kept):
        counts["numbered senses beside the first"] = more
    return kept, counts


def reversible(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Entries whose definition names exactly one term, so that it can be asked the other way round."""
    uses = Counter(row["definition"] for row in rows)
    return [row for row in rows if uses[row["definition"]] == 1 and row.get("senses", 1) == 1]


# symbols ------------------------------------------------------------------------------------------------

# Categories of characters that are symbols: signs, numbers that are no digits, and punctuation outside this list.
_SIGNS = ("So", "Sm", "Sc", "Sk", "No", "Nl", "Po", "Pd", "Pc")
_PUNCTUATION = frozenset(".,:;!?'\"`-_‐‑—―\\@¡¿‘’“”、。，．：；！？＂＇｀－＿＠")
# Letters by category that stand for something: Greek, units such as ℓ, raised ones.
_LETTER_SIGNS = ("GREEK", "MICRO", "SCRIPT", "ANGSTROM", "OHM", "SUPERSCRIPT", "FEMININE", "MASCULINE", "MODIFIER")


def is_symbol(character: str) -> bool:
    """A character whose meaning one has to know: neither a letter, a digit, a bracket nor everyday punctuation."""
    kind = unicodedata.category(character)
    if kind[0] == "L":
        return not character.isascii() and unicodedata.name(character, "").startswith(_LETTER_SIGNS)
    return kind in _SIGNS and character not in _PUNCTUATION


def count_symbols(texts: Iterable[str]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The symbols of the texts that have a meaning, most frequent first, with it and their count; and the others.

    Full-width forms (％) mean what their ordinary form does. Those without a meaning are reported, not dropped.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    meanings = {row["term"]: row["definition"] for row in records.read_json(SYMBOLS)}
    rows, unknown = [], Counter()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        meaning = meanings.get(character) or meanings.get(unicodedata.normalize("NFKC", character))
        if meaning:
            rows.append({"term": character, "definition": meaning, "count": count})
        elif is_symbol(character):
            unknown[character] = count
    return rows, unknown

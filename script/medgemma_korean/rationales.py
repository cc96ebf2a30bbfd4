"""Worked answers to exam questions: each is matched to a train item, checked against its key, and cleaned.

A published rationale may belong to a held-out question, argue for a wrong option, or contradict itself, and a model
learns all of that. What passes is the text between `<reasoning>` and `</reasoning>` (`prompts`), under the letters of
the train item.

    judge = Judge(train, held_out, longest=1200)
    counts = judge.own() + judge.add(folder, source)         # train items have "reasoning" now; drops are counted
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medgemma_korean import mcq, prompts, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import show
from medgemma_korean.sources import Source, check_columns

SHORTEST = 30  # characters; less is no reasoning

# Reasons for a drop.
UNUSABLE, HELD_OUT = "unusable row", "stands in dev, test or fewshot"
NO_ITEM, OTHER_KEY = "matches no train item", "another answer than the item's"
NO_LETTER, WRONG_LETTER = "no letter in the response", "wrong letter in the response"
CONTRADICTS, BY_NUMBER = "states another answer", "names options by number"
TOO_SHORT, TOO_LONG = "too_short", "too_long"
REPEATED, HAS_ONE = "exact_duplicate", "the item has one"


class Rationale(NamedTuple):
    """id: of the train item. reason: why it is dropped, or None."""

    id: str
    text: str
    reason: str | None


class Judge:
    """Gives `train` items their rationales. `held_out` are refined items too; `longest` counts characters."""

    def __init__(self, train: Sequence[dict[str, Any]], held_out: Sequence[Mapping[str, Any]], longest: int) -> None:
        from medgemma_korean.text.decontaminate import ExamIndex

        self.longest = longest
        self.held_out = ExamIndex(held_out)
        self.by_text = {mcq.item_key(item): item for item in train}
        self.by_id = {item["id"]: item for item in train}

    def own(self) -> Counter[str]:
        """Check the rationales that the items came with; one that does not pass is taken out."""
        counts: Counter[str] = Counter()
        for item in self.by_id.values():
            if "reasoning" in item:
                text, reason = clean(item.pop("reasoning"), item)
                if reason is None:
                    item["reasoning"] = text
                counts["own: read"] += 1
                counts[f"own: {reason or 'kept'}"] += 1
        return counts

    def add(self, folder: Path, source: Source) -> Counter[str]:
        """Put the published rationales of a folder, which may be absent, into the items that have none.

        One for each item, the first that passes: questions that models answer well have more of them, and would
        count for more. Raises PipelineError with the file for a missing column.
        """
        from medgemma_korean.text.clean import normalise_line

        counts: Counter[str] = Counter()
        seen = set()
        for file in records.row_files(folder) if folder.exists() else ():
            for number, row in enumerate(records.read_rows(file), 1):
                if number == 1 and (missing := check_columns(source, row)):
                    raise PipelineError(f"{show(file)}: {'; '.join(missing)}")
                found = self.judge(row, f"{show(file)}, row {number}", normalise_line)
                reason = found.reason
                if reason is None and found in seen:
                    reason = REPEATED
                elif reason is None and "reasoning" in self.by_id[found.id]:
                    reason = HAS_ONE
                if reason is None:
                    self.by_id[found.id] |= {"reasoning": found.text, "reasoning_source": source.key}
                seen.add(found)
                counts["read"] += 1
                counts[reason or "kept"] += 1
        return counts

    @staticmethod
    def useless(counts: Mapping[str, int]) -> int:
        """How many published rationales could not have been used for any item."""
        return counts["read"] - sum(counts[name] for name in ("kept", REPEATED, HAS_ONE))

    def judge(self, row: Mapping[str, Any], where: str, normalise: Callable[[str], str]) -> Rationale:
        """Judge a row {question, A..E, answer, thinking, response}, with or without the columns of an exam key."""
        keyed = {c: row[c] for c in (*mcq.EXAM_COLUMNS, *mcq.KEY_COLUMNS) if row.get(c) not in (None, "")}
        known = any(c in keyed for c in mcq.EXAM_COLUMNS) and all(c in keyed for c in mcq.KEY_COLUMNS)
        key = keyed if known else {"exam": "?", **dict.fromkeys(mcq.KEY_COLUMNS, 0)}
        question = {c: row.get(c) for c in ("question", *prompts.LETTERS, "answer")}
        try:
            given = mcq.read_raw_item(key | question, where, normalise, equal_options=True)
        except mcq.ItemProblem:
            return Rationale("", "", UNUSABLE)
        if self.held_out.same_item(given) or self.held_out.touched_by(f"{given['question']}\n{prompts.options(given)}"):
            return Rationale("", "", HELD_OUT)
        item = self.item_of(given)
        if item is None:
            return Rationale("", "", NO_ITEM)
        new_letter = letters_between(given, item)
        if new_letter[given["answer"]] != item["answer"]:
            return Rationale(item["id"], "", OTHER_KEY)
        thinking, response = (mcq.cell_text(row.get(c), normalise, "\n") for c in ("thinking", "response"))
        text, reason = self.reasoning(thinking, response, given)
        return Rationale(item["id"], prompts.reletter(text, new_letter), reason)

    def item_of(self, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The train item of the same folded question and options; or of the same key, where the options agree."""
        if found := self.by_text.get(mcq.item_key(given)):
            return found
        found = self.by_id.get(given["id"])
        return found if found and mcq.item_key(found)[1] == mcq.item_key(given)[1] else None

    def reasoning(self, thinking: str, response: str, item: Mapping[str, Any]) -> tuple[str, str | None]:
        """The cleaned rationale of a response that ends in the item's answer, or "" and a reason.

        What the response says for the reader comes first, then what it holds in tags, then the `thinking` column: that
        is a draft, often in English, which weighs what it later rejects.
        """
        letter = response_letter(response, item)
        if letter is None:
            return "", NO_LETTER
        if letter != item["answer"]:
            return "", WRONG_LETTER
        reason = TOO_SHORT
        for text in (*_apart(response), thinking):
            # Cleaning takes out little; of what is far too long it would only take time.
            cleaned, why_not = clean(text, item) if len(text) < 3 * self.longest else ("", TOO_LONG)
            if why_not is None and len(cleaned) > self.longest:
                why_not = TOO_LONG
            if why_not is None:
                return cleaned, None
            reason = reason if why_not == TOO_SHORT else why_not
        return "", reason


def letters_between(given: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, str]:
    """Letter of an option in `given` -> its letter in `item`, whose options are the same in any order."""
    from medgemma_korean.text.decontaminate import fold

    letter_of = {fold(item[letter]): letter for letter in prompts.letters_of(item)}
    return {letter: letter_of[fold(given[letter])] for letter in prompts.letters_of(given)}


# letters ------------------------------------------------------------------------------------------------

_THINK = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_CLOSE_R = re.compile(r"<R/>|</R>", re.IGNORECASE)


def unified(text: str) -> str:
    """A text whose reasoning stands between `<reasoning>` and `</reasoning>`, whichever tags it had."""
    text = _CLOSE_R.sub("</reasoning>", _THINK.sub(r"<\1reasoning>", text))
    return re.sub("<R>", "<reasoning>", text, flags=re.IGNORECASE)


def response_letter(response: str, item: Mapping[str, Any]) -> str | None:
    """The letter that a response answers, by our extractor: stated anywhere, else on the last or first line."""
    text = unified(response)
    found = mcq.extract_answer(text, item)
    if found.reason in (mcq.MARKED, mcq.AMBIGUOUS, mcq.UNCLOSED):
        return found.letter
    last = text.rsplit("</reasoning>", 1)[-1].strip().rsplit("\n", 1)[-1]
    return mcq.extract_answer(last, item).letter or found.letter


def _apart(response: str) -> Iterator[str]:
    """What stands behind the reasoning tags of a response, and what in them; all of it where there are none."""
    inside, closed, behind = unified(response).partition("</reasoning>")
    if not closed:
        yield inside
        return
    yield behind
    yield inside.replace("<reasoning>", "")


# cleaning -----------------------------------------------------------------------------------------------

_TURN_ENDS = re.compile(r"<(?:end_of_turn|start_of_turn|eos)>|<\|(?:im_end|im_start|eot_id|endoftext)\|>")
# Control tokens of Gemma and other models, and the tags of answers: typed in a text they would become real ones.
_TAGS = re.compile(
    r"</?(?:reasoning|answer|bos|pad|unk|mask|unused[0-9]{1,4}|(?:start_of|end_of)_image|image_soft_token|s)>"
    r"|<\|[A-Za-z_]{1,30}\|>|\[/?INST\]",
    re.IGNORECASE,
)
_MARKDOWN = re.compile(r"\*\*|^#{1,6} +|^(?:-{3,}|\*{3,}|```\w*)$|\${0,2}\\boxed\{[^{}]{0,40}\}\${0,2}", re.MULTILINE)
# Options that are named by number cannot follow when the options change places.
_BY_NUMBER = re.compile(
    r"[①-⑤]|^[1-5]번|(?:선택지|보기) ?[1-5](?![0-9개가])"
    r"|(?:정답|답)(?:은|는|이|가)? ?:? ?[1-5](?:번|입니다|이다|[.)\s]|$)",
    re.MULTILINE,
)
# What a bare statement of the answer, or the heading above it, is made of.
_WORDS = re.compile(
    r"따라서|그러므로|결론적으로|결론|그래서|최종|이 문제의|가장 (?:적절한|옳은)|올바른|선택지|보기|정답|답변|답"
    r"|해설|풀이|설명"
    r"|\b(?:therefore|so|thus|the|final|correct|best|answer|option|choice|is|explanation|conclusion)\b"
    r"|입니다|이다|번|은|는|이|가|[A-E](?![A-Za-z])|(?<![0-9])[1-5](?=번)|[①-⑤]",
    re.IGNORECASE,
)


def clean(text: str, item: Mapping[str, Any]) -> tuple[str, str | None]:
    """A rationale without tags, Markdown and the bare statement of the answer, which the template adds; or a reason.

    A statement inside the argument stays where it names the item's answer (`prompts.reletter` moves it along).
    """
    text = _TAGS.sub("", _TURN_ENDS.split(unified(text), maxsplit=1)[0])
    stated = mcq.stated_answer(text, item)
    if stated is not None and stated.letter != item["answer"]:
        return "", CONTRADICTS
    lines = [line.strip() for line in _MARKDOWN.sub("", text).split("\n")]
    lines = [_without_statement(line, item) for line in lines if line]
    # A line "C) 심근경색" opens the discussion of an option; at the end it is the answer, and often at the start.
    for end in (-1, 0):
        while lines and (_says_nothing(lines[end]) or _only_answers(lines[end], item, (mcq.BARE, mcq.WITH_TEXT))):
            lines.pop(end)
    text = "\n".join(line for line in lines if line)
    if not _BY_NUMBER.search(f"{item['question']}\n{prompts.options(item)}") and _BY_NUMBER.search(text):
        return "", BY_NUMBER
    return (text, None) if len(text) >= SHORTEST else ("", TOO_SHORT)


def _without_statement(line: str, item: Mapping[str, Any]) -> str:
    """A line without what only states the answer at its ends: "… 우선이다. 정답: C. 산소 투여"."""
    sentences = re.split(r"(?<=[.!?]) +", line)
    for count in (2, 1):  # "C." ends a sentence, and its option follows
        if _only_answers(" ".join(sentences[-count:]), item, (mcq.MARKED,)):
            sentences = sentences[:-count]
        if _only_answers(" ".join(sentences[:count]), item, (mcq.MARKED,)):
            sentences = sentences[count:]
    return " ".join(sentences)


def _only_answers(text: str, item: Mapping[str, Any], reasons: Sequence[str]) -> bool:
    """Whether a text says nothing but the item's answer, and by one of these rules of the extractor."""
    if not text or len(text) > 300:
        return False
    found = mcq.extract_answer(text, item)
    if found.letter != item["answer"] or found.reason not in reasons:
        return False
    return _says_nothing(text.replace(item[found.letter], " "))


def _says_nothing(text: str) -> bool:
    return not any(c.isalnum() for c in _WORDS.sub(" ", text))

"""Multiple-choice items: reading raw rows, extracting the answer letter, scoring. The only extractor of the project.

Training scores, evaluation and chat all use `extract_answer`, so a letter means the same everywhere. It prefers no
letter to a guessed one: an output that names two options, denies one, or merely begins with a letter (`E. coli`)
counts as unparsed, with a reason, and unparsed counts as wrong.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medgemma_korean import records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import show
from medgemma_korean.prompts import LETTERS, letters_of, shuffled
from medgemma_korean.statistics import majority_baseline, wilson

# reading ------------------------------------------------------------------------------------------------

EXAM_COLUMNS = ("exam_type", "exam", "subject")  # ours first; a published subject may be finer than the exam
KEY_COLUMNS = ("year", "period", "q_number")
_CELL_TYPES = (str, int, float, type(None))  # a CSV reader turns an option such as "12" into a number


ITEM_KEYS = ("question", *LETTERS[:4], "answer")  # what a refined item has at least


class ItemProblem(PipelineError):
    """A row of the right shape with a value that makes no question: two equal options, an answer out of range."""


def read_raw_items(
    file: Path, normalise: Callable[[str], str], unusable: list[str] | None = None
) -> list[dict[str, str]]:
    """All items of a raw split file, in order.

    With a list for `unusable` (train), rows that make no question are described there and left out. Without one
    (dev, test) they raise: an evaluation row is never dropped. Equal options are then kept, since they do not keep
    a question from being scored. Raises PipelineError with file and row.
    """
    items, shown = [], show(file)
    for number, row in enumerate(records.read_rows(file), 1):
        where = f"{shown}, row {number}"
        try:
            items.append(read_raw_item(row, where, normalise, equal_options=unusable is None))
        except PipelineError as problem:
            if unusable is None or not isinstance(problem, ItemProblem):
                raise type(problem)(f"{problem}; correct that row") from None
            unusable.append(str(problem))
    return items


def read_raw_item(
    row: Mapping[str, Any], where: str, normalise: Callable[[str], str], equal_options: bool = False
) -> dict[str, str]:
    """One raw KorMedMCQA row as a refined item {"id", "exam", "question", "A".."E", "answer", "reasoning"?}.

    `where` is the file and line for messages; `normalise` cleans one line of text. `id` is
    "exam-year-period-q_number", which identifies an item within one split only. A row without E (absent, null or
    empty) is a four-option item and has no key "E". Lines of a question or rationale stay lines; an option is one
    line. Raises PipelineError for a missing column, and its kind ItemProblem, naming all problems of the row at
    once, for a key that is not a whole number, an empty question or option, two equal options (unless
    `equal_options`), an answer that is not 1..5 or the letter of an option.
    """
    exam_column = next((column for column in EXAM_COLUMNS if column in row), None)
    missing = [] if exam_column else ["subject"]
    missing += [column for column in (*KEY_COLUMNS, "question", *LETTERS[:4], "answer") if column not in row]
    if missing:
        raise PipelineError(f"{where}: missing column {', '.join(missing)}; the row has {', '.join(map(str, row))}")

    wrong = [c for c in (exam_column, "question", *LETTERS, "cot") if not isinstance(row.get(c), _CELL_TYPES)]
    if wrong:
        raise PipelineError(f"{where}: {', '.join(wrong)}: expected text, found {type(row[wrong[0]]).__name__}")

    exam = cell_text(row[exam_column], normalise, " ")
    key = {column: _whole_number(row[column]) for column in KEY_COLUMNS}
    question = cell_text(row["question"], normalise, "\n")
    options = {letter: cell_text(row.get(letter), normalise, " ") for letter in LETTERS}
    if not options["E"]:
        del options["E"]
    answer = _answer_letter(row["answer"], "".join(options))

    problems = [f"{column} is {row[column]!r}, not a whole number" for column, value in key.items() if value is None]
    problems += [f"{column} is empty" for column, text in {exam_column: exam, "question": question}.items() if not text]
    problems += [f"option {letter} is empty" for letter, text in options.items() if not text]
    letters = list(options)
    problems += [
        f"options {first} and {second} are equal ({options[first]!r})"
        for i, first in enumerate(letters)
        for second in letters[i + 1 :]
        if options[first] and options[first] == options[second] and not equal_options
    ]
    if answer is None:
        problems.append(f"answer {row['answer']!r} is neither 1..{len(options)} nor one of {', '.join(letters)}")
    if problems:
        raise ItemProblem(f"{where}: {'; '.join(problems)}")

    item = {"id": "-".join([exam, *map(str, key.values())]), "exam": exam, "question": question, **options}
    item["answer"] = answer
    if reasoning := cell_text(row.get("cot"), normalise, "\n"):
        item["reasoning"] = reasoning
    return item


def read_items(file: Path, also: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The refined items of a split, in order. also: further keys that must hold text.

    Raises PipelineError for a row that is no item, as in a file of another stage, that lacks an option before its last
    one, or whose answer is no option of it.
    """
    items = list(records.read_jsonl(file, needs=(*ITEM_KEYS, *also)))
    for number, item in enumerate(items, 1):
        letters = letters_of(item)
        if letters not in (LETTERS, LETTERS[:-1]):
            lacking = ", ".join(letter for letter in LETTERS[:-1] if letter not in letters)
            raise PipelineError(f"{show(file)}, row {number}: option {lacking} is empty")
        if item["answer"] not in tuple(letters_of(item)):
            raise PipelineError(f"{show(file)}, row {number}: answer {item['answer']!r} is none of {letters_of(item)}")
    return items


def cell_text(value: Any, normalise: Callable[[str], str], joint: str) -> str:
    """The value's non-empty lines, each normalised, joined by `joint`; "" for None and NaN (an empty CSV cell)."""
    if value is None or value != value:
        return ""
    lines = (normalise(line) for line in str(value).splitlines())
    return joint.join(line for line in lines if line.strip()).strip()


def item_key(item: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    """Folded question and folded set of options: equal for the same question in another order, spacing or width."""
    from medgemma_korean.text.decontaminate import fold

    return fold(item["question"]), frozenset(fold(item[letter]) for letter in letters_of(item))


def _whole_number(value: Any) -> int | None:
    """An int from 2021, 2021.0, "2021" or "2021.0", the forms that CSV and JSON exports give; None otherwise."""
    if isinstance(value, bool):
        return None
    match = re.fullmatch(r"([0-9]+)(?:\.0+)?", str(value).strip())
    return int(match[1]) if match else None


def _answer_letter(value: Any, letters: str) -> str | None:
    """The letter of an answer column: 1 is A; letters are taken as they are, in either case."""
    number = _whole_number(value)
    if number is not None:
        return letters[number - 1] if 1 <= number <= len(letters) else None
    letter = unicodedata.normalize("NFKC", value).strip().upper() if isinstance(value, str) else ""
    return letter if len(letter) == 1 and letter in letters else None


# extraction ---------------------------------------------------------------------------------------------


class Extraction(NamedTuple):
    """The letter an output answers, or None, and the rule that decided so (one of the constants below)."""

    letter: str | None
    reason: str


MARKED, BARE, WITH_TEXT = "marked answer", "bare letter", "letter with option text"
EMPTY, UNCLOSED, NOT_OPTION = "empty", "reasoning not closed", "not an option"
AMBIGUOUS, OPTION_LIST, OPTION_TEXT = "two answers or a denied one", "list of options", "option text only"
NOT_FOUND, REFUSED = "no answer found", "refused"

_END = re.compile(r"<end_of_turn>|<eos>|<start_of_turn>")
_OPENING_TAG = re.compile(r"<reasoning>|<R>", re.IGNORECASE)
_CLOSING_TAG = re.compile(r"</reasoning>|<R/>", re.IGNORECASE)

# Hangul syllables and both kinds of jamo; NFKC turns ㄱ into a conjoining jamo.
_HANGUL = "가-힣ㄱ-ㆎ\u1100-\u11ff"
_TOKEN = r"([A-Za-z]|[1-9])(?![A-Za-z0-9])"
_STATED = r"(?:입니다|이다|임|이에요|예요|이며|이고|이므로|[를을] 선택(?:합니다|하겠습니다|함))"

# What marks an answer. Not the 답 of 오답 and 응답, or a closing </answer>.
_MARK = re.compile(rf"(?<![{_HANGUL}A-Za-z/])(?:최종\s?)?(?:정답|답|answer(?![a-z]))", re.IGNORECASE)
# Right before a mark that is none: "I cannot answer", "I can't give you a definitive answer".
_NO_ANSWER = re.compile(
    r"(?:cannot|not|n['’]t|to) (?:(?:give|provide|offer)(?: you)?(?: an?| the| any)?"
    r"(?: (?:clear|correct|definite|definitive|direct|final|single|specific))? )?$",
    re.IGNORECASE,
)
# What may stand between mark and letter: quotes and brackets, one particle or colon, \boxed{. Bounded, so that a
# long run of spaces costs nothing.
_GAP = re.compile(
    r"""[\s"')\]]{0,4}(?:알파벳|번호)?\s{0,2}(?:은|는|이|가|is\b|=|→)?[\s:="'(\[<>{$]{0,6}"""
    r"""(?:\\boxed\{)?(?:\\text\{)?(?:(?:option|choice)\b|선택지|보기)?[\s"'(\[]{0,3}""",
    re.IGNORECASE,
)
_IS_ANSWER = re.compile(
    rf"""(?<![A-Za-z0-9{_HANGUL}°.])["'(\[]{{0,2}}{_TOKEN}번?["')\]]{{0,2}} ?[가이은는] ?(?:최종 ?)?정?답"""
    rf"{_STATED}?(?![{_HANGUL}])(?! ?(?:아니|아닌|아님|아닙))"
)
# "B가 정답" opens a clause; the B of "비타민 B가 정답" does not.
_CLAUSE_START = re.compile(r"(?:^|[\n.!?:,]|(?:중|에서|따라서|그러므로|결국|보기|선택지))\s*$")
_BEFORE_SECOND = re.compile(rf"""{_TOKEN}번?["')\]]{{0,2}}\s?(?:[,/&]|와|과|및|또는|혹은|이나|or|and)\s?$""")

_REACH = 500  # characters after a mark that are looked at; keeps an endlessly repeating output cheap
# Right after a letter: a second option, or a denial ("A, B", "A 또는 B", "A가 아니다").
_SECOND_OR_DENIED = re.compile(
    rf"""번?(?:[ ]?,
    |["')\]}}]{{0,3}}[ ]?(?:
        [,/&+~·][ ]?["'(\[]{{0,2}}{_TOKEN}
        |(?:와|과|이나|나|하고)(?=[\s"'(A-Z1-9])
        |또는|혹은|및\s|그리고|or\b|and\b
        |[가이은는]?[ ]?(?:아니|아닌|아님|아닙)))""",
    re.VERBOSE | re.IGNORECASE,
)
_ENDING = re.compile(rf"""(번?)(["')\]}}>]{{0,3}}) ?({_STATED}?)""")
_BARE = re.compile(rf"""번?["')\]]{{0,3}}\s?{_STATED}?\s?[.):!]?""")
_SEPARATED = re.compile(r"""번?["'\]]{0,2}\s?[.):]\s*(.+)""")
_DENIED_TEXT = re.compile(r"정답이? 아[니닌닙님]|오답|틀[리린립림렸]")
_STARTS_HANGUL = re.compile(rf"""["'“‘(\[<]{{0,2}}[{_HANGUL}]""")
# Asked of an output without an answer, to count it apart from one that is merely unreadable, and of what stands after
# a letter in place of its option: "A. 모르겠습니다".
_REFUSAL = re.compile(
    r"죄송|모르겠|(?:답변?|대답|결정|제공|판단)(?:을|를|은)? ?(?:할|드릴|내릴|해 드릴) 수 없"
    r"|정답을? 알 수 없|알 수 없(?:습니다|어요|다)"
    r"|(?:cannot|can['’]t|unable to|not able to|won['’]t) (?:answer|provide|determine|give|help|assist)"
    r"|don['’]t know|i['’]m sorry|i am sorry",
    re.IGNORECASE,
)


def extract_answer(output: str, item: Mapping[str, Any] | None = None, letters: str = LETTERS) -> Extraction:
    """The option letter that a model's output answers, by the rules below.

    In order: cut at the end of the turn; read only what follows closed reasoning; unify digits, widths and markup;
    take a marked answer (`정답: B`, `B가 정답`); else the first line must be the bare letter, or the letter and its
    option. `item` restricts the letters to its options and lets English option text be recognised; without it
    `letters` are the options. Circled and marked digits count as letters, a bare digit does not. Never raises.

    A refusal has no letter, also where it begins like an answer ("A. 모르겠습니다", "정답: A. 죄송합니다"). An explicit
    marked answer counts whatever was said before it: "죄송하지만 답변을 드릴 수 없습니다. 정답: B" is B, for whoever
    reads it has been given one.
    """
    answer = _after_reasoning(_END.split(output, maxsplit=1)[0])
    if answer is None:
        return Extraction(None, UNCLOSED)
    text = _plain(answer)
    if not text:
        return Extraction(None, EMPTY)
    options = _plain_options(item)
    letters = "".join(options) or letters
    found = _marked_answer(text, options, letters) or _first_line_answer(text, options, letters)
    return Extraction(None, REFUSED) if found.reason == NOT_FOUND and _REFUSAL.search(text[:_REACH]) else found


def stated_answer(text: str, item: Mapping[str, Any]) -> Extraction | None:
    """What a text, reasoning included, states as the answer ("정답은 B", "B가 정답"); None where it states nothing.

    The letter is None where it states two answers, denies one, or names a letter that is no option.
    """
    options = _plain_options(item)
    return _marked_answer(_plain(text), options, "".join(options))


def _plain_options(item: Mapping[str, Any] | None) -> dict[str, str]:
    return {letter: _plain(str(item[letter])) for letter in letters_of(item)} if item else {}


def _after_reasoning(text: str) -> str | None:
    """The text after the first closing tag, up to another opening one; None when reasoning was never closed."""
    closing = _CLOSING_TAG.search(text)
    if closing:
        return _OPENING_TAG.split(text[closing.end() :], maxsplit=1)[0]
    return None if _OPENING_TAG.search(text) else text


def _plain(text: str) -> str:
    """Circled digits as `n번`, NFKC, no markup."""
    text = re.sub("([①-⑤])번?", lambda match: f"{ord(match[1]) - ord('①') + 1}번", text)
    return re.sub(r"[*_#`]", "", unicodedata.normalize("NFKC", text)).strip()


def _letter(token: str) -> str:
    return chr(ord("A") + int(token) - 1) if token.isdigit() else token.upper()


def _decided(letter: str, reason: str, letters: str) -> Extraction:
    return Extraction(letter, reason) if letter in letters else Extraction(None, NOT_OPTION)


def _marked_answer(text: str, options: Mapping[str, str], letters: str) -> Extraction | None:
    """Rule 4 over the whole text; None when nothing is marked."""
    found, taken = set(), []
    for match in _IS_ANSWER.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        if _BEFORE_SECOND.search(before):
            return Extraction(None, AMBIGUOUS)
        if not _CLAUSE_START.search(before):
            continue
        found.add(_letter(match[1]))
        taken.append(match.span())
    for mark in _MARK.finditer(text):
        if any(start <= mark.start() < end for start, end in taken):
            continue
        if _NO_ANSWER.search(text[max(0, mark.start() - 50) : mark.start()]):
            continue
        start = _GAP.match(text, mark.end()).end()  # the pattern matches the empty string, hence always
        token = re.compile(_TOKEN).match(text, start)
        if token is None:
            continue
        letter, tail = _letter(token[1]), text[token.end() : token.end() + _REACH]
        if _SECOND_OR_DENIED.match(tail):
            return Extraction(None, AMBIGUOUS)
        if not _ends_answer(tail, token[1], text[start - 1] == "(", options.get(letter)):
            continue
        line = text[start : start + _REACH].partition("\n")[0]
        if _names_second_option(line, letter):
            return Extraction(None, AMBIGUOUS)
        if _is_option_text(line, letter, options):
            return Extraction(None, OPTION_TEXT)
        following = _after(tail)
        if _REFUSAL.match(following) and not _begins_with(following, options.get(letter)):
            return Extraction(None, REFUSED)
        found.add(letter)
    if len(found) > 1:
        return Extraction(None, AMBIGUOUS)
    return _decided(found.pop(), MARKED, letters) if found else None


def _ends_answer(tail: str, token: str, in_brackets: bool, option: str | None) -> bool:
    """The right boundary of a marked answer: is the token an answer, or the start of `BMI`, `B형 간염`, `2.5 mg`?"""
    ending = _ENDING.match(tail)
    rest = tail[ending.end() :] if ending[3] else tail[ending.end(2) :]
    if ending[3]:
        return not re.match(rf"[{_HANGUL}A-Za-z0-9]", rest)
    if re.match(r"\s*(?:\n|$)|[!;<$(]", rest) or (ending[2] and rest[0] == ","):  # {"정답": "B", "해설": ...}
        return True
    if ")" in ending[2]:  # "정답: B) 심근경색", but not "정답은 (A)일 수 없다"
        return not re.match(rf"[{_HANGUL}]" if in_brackets else r"[0-9]", rest)
    following = rest.lstrip(" .:\t").partition("\n")[0]
    if option and _same_text(following, option):
        return True
    if rest[0] in ".:":  # "정답: B. 심근경색", "The answer is B. The...", but not "2.5", "E. coli"
        return not re.match(r"[.:][A-Za-z0-9]|\.\s*[a-z]", rest)
    if rest[0].isspace() and (token.isalpha() or ending[1]):  # "정답: B 심근경색", but not "정답은 2 가지"
        return bool(re.match(rf"\s+(?:[(→–-]\s?|because\b|since\b|{_STARTS_HANGUL.pattern})", rest))
    return False


def _first_line_answer(text: str, options: Mapping[str, str], letters: str) -> Extraction:
    """Rule 5: the first line is the bare letter, or the letter with its option."""
    line, _, below = text.partition("\n")
    line = re.sub(r"^(?:따라서|그러므로),?\s*", "", line.strip())
    next_line = below.strip().partition("\n")[0].strip()
    token = re.match(rf"""["'(\[]{{0,3}}{_TOKEN}""", line)
    if token is None:
        return Extraction(None, OPTION_TEXT if any(_same_text(line, o) for o in options.values()) else NOT_FOUND)
    letter, tail = _letter(token[1]), line[token.end() :]
    if token[1].isdigit() and not tail.startswith("번"):
        return Extraction(None, NOT_FOUND)
    if _is_option_text(line, letter, options):
        return Extraction(None, OPTION_TEXT)
    if _BARE.fullmatch(tail):
        second = re.fullmatch(rf"""["'(\[]{{0,3}}{_TOKEN}{_BARE.pattern}""", next_line)
        if second and second[1].isalpha() and _letter(second[1]) != letter:
            return Extraction(None, AMBIGUOUS)
        if tail[-1:] in (".", ")", ":") and _REFUSAL.match(next_line):  # "A.\n모르겠습니다"
            return Extraction(None, REFUSED)
        return _decided(letter, BARE, letters)
    if _SECOND_OR_DENIED.match(tail):
        return Extraction(None, AMBIGUOUS)
    if re.match(rf"""번?["')\]]{{0,3}}\s?{_STATED}[.,!;:\s]""", tail):  # "B입니다. IPv6의 주소는 ..."
        return _decided(letter, BARE, letters)
    option, separated = options.get(letter), _SEPARATED.match(tail)
    following = separated[1] if separated else tail.removeprefix("번")
    if option and _same_text(following, option):
        if _heads_next_option(next_line, letter):
            return Extraction(None, OPTION_LIST)
        return _decided(letter, WITH_TEXT, letters)
    if separated and _STARTS_HANGUL.match(following):
        if _DENIED_TEXT.match(following):
            return Extraction(None, AMBIGUOUS)
        if _REFUSAL.search(following[:_REACH].removeprefix(option or "")):
            return Extraction(None, REFUSED)
        if _names_second_option(line, letter) or _heads_next_option(next_line, letter):
            return Extraction(None, OPTION_LIST)
        return _decided(letter, WITH_TEXT, letters)
    return Extraction(None, NOT_FOUND)


def _after(tail: str) -> str:
    """What the line says after a letter."""
    return re.sub(r"""^번?["')\]}>]{0,3}[ .:]{0,3}["'“‘(\[]{0,2}""", "", tail).partition("\n")[0]


def _begins_with(text: str, option: str | None) -> bool:
    return bool(option) and text.startswith(option)


def _names_second_option(line: str, letter: str) -> bool:
    """ "B) 심근경색, C) 협심증" and "A. 협심증 B. 심근경색": another option is named on the line."""
    heads = re.finditer(rf"([,/]\s?|\s)([A-Z])(?:[):]|\.\s?[{_HANGUL}])", line)
    return any(head[2] != letter and (head[1].strip() or ord(head[2]) == ord(letter) + 1) for head in heads)


def _heads_next_option(line: str, letter: str) -> bool:
    """The options are only repeated, one a line: the line after "A. ..." is "B. ..."."""
    return bool(re.match(rf"""["'(\[]?{chr(ord(letter) + 1)}\s?[.):]""", line))


def _is_option_text(line: str, letter: str, options: Mapping[str, str]) -> bool:
    """The line is another option's text that happens to begin like an answer: "B 세포", "2번"."""
    return any(
        known != letter and _same_text(line, option) and not (len(option) == 1 and option.isalpha())
        for known, option in options.items()
    )


def _same_text(text: str, option: str) -> bool:
    def fold(value: str) -> str:
        value = re.sub(r"\s", "", value)
        for _ in range(2):  # "... 줄인다." + "입니다."
            value = value.rstrip(".!")
            value = value.removesuffix("입니다") if value.endswith("입니다") else value.removesuffix("이다")
        return value.rstrip(".!").casefold().strip("\"'")

    return fold(text) == fold(option)


# scores -------------------------------------------------------------------------------------------------

ALARM_SHARE = 0.40  # of the predicted letters; five options share about 20 % each


def score(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy of rows {"id", "exam", "gold", "predicted" (letter or None), "reason"}, overall and by exam.

    Returns n (all rows), correct, accuracy, lower, upper (Wilson 95 %), majority_letter, majority_accuracy (of
    always answering the commonest gold letter), predicted and gold (counts by letter), accuracy_by_gold, unparsed
    and unparsed_reasons (rows without a letter: they count as wrong), refused (those of the unparsed that decline to
    answer), accuracy_parsed (None when no row has a letter), alarm (the letter that more than 40 % of the predicted
    letters are, or None), and exams: the same by exam. Raises ValueError when there are no rows.
    """
    exams: dict[str, list[Mapping[str, Any]]] = {}
    for row in predictions:
        exams.setdefault(row["exam"], []).append(row)
    return {**_score(predictions), "exams": {exam: _score(rows) for exam, rows in sorted(exams.items())}}


def _score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    gold = Counter(row["gold"] for row in rows)
    predicted = Counter(row["predicted"] for row in rows if row["predicted"] is not None)
    hits = Counter(row["gold"] for row in rows if row["predicted"] == row["gold"])
    n, parsed, correct = len(rows), predicted.total(), hits.total()
    lower, upper = wilson(correct, n)
    letter, baseline = majority_baseline([row["gold"] for row in rows])
    reasons = Counter(row["reason"] for row in rows if row["predicted"] is None)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "lower": lower,
        "upper": upper,
        "majority_letter": letter,
        "majority_accuracy": baseline,
        "predicted": _histogram(predicted),
        "gold": _histogram(gold),
        "accuracy_by_gold": {known: hits[known] / count for known, count in sorted(gold.items())},
        "unparsed": n - parsed,
        "unparsed_reasons": dict(reasons.most_common()),
        "refused": reasons[REFUSED],
        "accuracy_parsed": correct / parsed if parsed else None,
        "alarm": next((known for known, count in predicted.most_common(1) if count > ALARM_SHARE * parsed), None),
    }


def _histogram(counts: Counter[str]) -> dict[str, int]:
    return {letter: counts[letter] for letter in sorted({*LETTERS, *counts})}


def within_chance(score: Mapping[str, Any]) -> bool:
    """True when a `score` does not show more than always answering the commonest letter would.

    That is when its Wilson interval holds the majority baseline or lies below it.
    """
    return score["lower"] <= score["majority_accuracy"]


# rotated options ----------------------------------------------------------------------------------------


def rotated(item: Mapping[str, Any], shift: int) -> dict[str, Any]:
    """The item with its options rotated: position j shows option (j + shift) mod n. The answer follows its option."""
    n = len(letters_of(item))
    bare = {key: value for key, value in item.items() if key != "reasoning"}
    return shuffled(bare, [(j + shift) % n for j in range(n)])


def chosen_option(item: Mapping[str, Any], letter: str | None, shift: int) -> str | None:
    """The letter that the unrotated item has for the option that `rotated(item, shift)` shows under `letter`."""
    letters = letters_of(item)
    return None if letter is None else letters[(letters.index(letter) + shift) % len(letters)]


def rotation_scores(golds: Sequence[str], chosen: Sequence[Sequence[str | None]]) -> dict[str, Any]:
    """Scores over rotations of the options: chosen[i][s] is the option (`chosen_option`) of item i at shift s.

    Items may differ in their number of rotations, from shift 0 on: one of four options has no fifth.
    Returns n (the most rotations of an item), accuracies (by shift, of the items that have it), mean_accuracy (each
    item's own mean counts once), consistency (share of items whose option, not letter, is the same at every shift; one
    without an answer is not consistent), vote_accuracy with lower and upper (Wilson 95 %), and unparsed. The vote is
    for the commonest option, of equals for the one that came first.
    """
    n, items = max(map(len, chosen)), len(golds)
    rights = [[option == gold for option in options] for gold, options in zip(golds, chosen, strict=True)]
    votes = [vote(options) for options in chosen]
    right = sum(option == gold for gold, option in zip(golds, votes, strict=True))
    lower, upper = wilson(right, items)
    at_shift = [[row[shift] for row in rights if shift < len(row)] for shift in range(n)]
    return {
        "n": n,
        "accuracies": [sum(found) / len(found) for found in at_shift],
        "mean_accuracy": math.fsum(sum(row) / len(row) for row in rights) / items,
        "consistency": sum(options[0] is not None and len(set(options)) == 1 for options in chosen) / items,
        "vote_correct": right,
        "vote_accuracy": right / items,
        "vote_lower": lower,
        "vote_upper": upper,
        "unparsed": sum(option is None for options in chosen for option in options),
    }


def vote(options: Sequence[str | None]) -> str | None:
    """The commonest of the options, of equals the first; None where there is no option at all."""
    found = Counter(option for option in options if option is not None)
    return found.most_common(1)[0][0] if found else None  # most_common keeps the order of equals


# questions that keep failing ----------------------------------------------------------------------------

PREVIEW = 80  # characters


def wrong(predictions: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """The letter predicted for each item that failed, by its id."""
    return {row["id"]: row["predicted"] for row in predictions if row["predicted"] != row["gold"]}


def failed_questions(
    looks: Sequence[tuple[int, Mapping[str, str | None]]], items: Sequence[Mapping[str, Any]], most: int = 10
) -> list[dict[str, Any]]:
    """The questions that fail most often over the looks at one training, in the order of steps.

    looks: (step, `wrong` at that step).

    Returns at most `most` of {"question_id", "fail_count", "expected", "last_predicted" (None: no letter),
    "question_preview", "last_failed_step"}: most failures first, of equals the one that failed last, then by id. Both
    of the "last" values are those of the last look at which the question failed.
    """
    found: dict[str, dict[str, Any]] = {}
    known = {item["id"]: item for item in items}
    for step, wrong in looks:
        for key, predicted in wrong.items():
            new = {"question_id": key, "fail_count": 0, "expected": known[key]["answer"]}
            entry = found.setdefault(key, new)
            entry["fail_count"] += 1
            entry["last_predicted"] = predicted
            question = " ".join(known[key]["question"].split())
            entry["question_preview"] = question if len(question) <= PREVIEW else f"{question[: PREVIEW - 1]}…"
            entry["last_failed_step"] = step
    order = sorted(found.values(), key=lambda e: (-e["fail_count"], -e["last_failed_step"], e["question_id"]))
    return order[:most]


# training-time scores -----------------------------------------------------------------------------------

_STEP_NAMES = ("첫째", "둘째", "셋째", "넷째")
_OPTION_HEAD = r"(?<![A-Za-z가-힣])[A-E]\)"
_PERCENT = r"\d+(?:\.\d+)?\s?%"


def format_score(text: str) -> float:
    """How much of the reasoning format an output has, 0..1 in tenths.

    Ten checks of equal weight: both reasoning tags; each of `첫째:` `둘째:` `셋째:` `넷째:` followed by three or
    more words; each of `A)`..`E)` followed by three or more words and a percentage. Option heads and percentages
    are no words. Only for looking at training; never an accuracy, never for selection.
    """
    opening, closing = _OPENING_TAG.search(text), _CLOSING_TAG.search(text)
    tagged = bool(opening and closing and opening.end() <= closing.start())
    body = text[opening.end() : closing.start()] if tagged else text
    steps = re.split(rf"({'|'.join(_STEP_NAMES)}):", body)
    passed_steps = {name for name, part in zip(steps[1::2], steps[2::2], strict=True) if _words(part) >= 3}
    shares = re.split(rf"({_OPTION_HEAD})", body)
    passed_options = {
        head
        for head, part in zip(shares[1::2], shares[2::2], strict=True)
        if _words(part) >= 3 and re.search(_PERCENT, part)
    }
    return (tagged + len(passed_steps) + len(passed_options)) / 10


def _words(text: str) -> int:
    words = re.sub(rf"{_OPTION_HEAD}|{_PERCENT}", " ", text).split()
    return sum(any(character.isalnum() for character in word) for word in words)


def combined_score(text: str, gold: str, item: Mapping[str, Any] | None = None) -> float:
    """Answer and format in one number: 2/3 + f/3 when the extracted letter is `gold`, else f/4, f = `format_score`.

    An unparsed answer counts as wrong.
    """
    form = format_score(text)
    return 2 / 3 + form / 3 if extract_answer(text, item).letter == gold else form / 4

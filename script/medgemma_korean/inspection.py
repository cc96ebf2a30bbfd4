"""What the model really sees: rows and batches as marked text, and the states that they must never be in.

Every training inspects its rows and its first batch before it takes a step; `inspect_batches.py` prints more of them.

datasets is imported inside functions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medgemma_korean import batches, cli, evaluation, prompts
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.batches import Row
from medgemma_korean.cli import PipelineError

if TYPE_CHECKING:
    from medgemma_korean.training import Plan

SUPERVISED, MASKED, PADDING = "supervised", "masked", "padding"
COLOURS = {SUPERVISED: "\033[1;32m", MASKED: "\033[2m", PADDING: "\033[41m"}
MARKS = {SUPERVISED: "⟦⟧", MASKED: ("", ""), PADDING: "⟪⟫"}
CUT = "[…]"
FIRST_ROWS = 2  # of the first batch, in the log of a training
CHARACTERS = 600  # about so many of each
EXCERPT = 160  # about so many of a row that is refused
MOST_PROBLEMS = 10  # named in one error; the others are counted

Document = tuple[list[int], list[int]]  # ids and labels


def first_batch(plan: Plan, tokenizer: Any, collator: Any, embedding_rows: int | None = None) -> str:
    """The first rows of a plan as its first batch holds them, for the log.

    collator: the trainer's own. embedding_rows: how many token ids the model has. Raises PipelineError that names the
    forbidden states of all rows and of the collated batch.
    """
    refuse(problems_of(plan, tokenizer, embedding_rows))
    first = plan.rows[: plan.settings.micro_batch]
    batch = collator(list(batches.dataset(first)))
    refuse(problems_of_batch(batch, first, tokenizer.pad_token_id))
    shown = first[:FIRST_ROWS]
    head = f"the first {cli.count(len(shown), 'row')} as trained, supervised in ⟦⟧, padding in ⟪⟫, the rest masked:"
    return "\n".join([head, *described(tokenizer, batch, shown, limit=CHARACTERS)])


def refuse(problems: Sequence[str]) -> None:
    """Raise PipelineError where there are problems, with the first ones and the number of the others."""
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        lines = [*problems[:MOST_PROBLEMS], *more]
        raise PipelineError("these rows must not be trained:\n  " + "\n  ".join(lines))


# as text ------------------------------------------------------------------------------------------------


def segments(ids: Sequence[int], labels: Sequence[int], pad: int) -> list[tuple[str, list[int]]]:
    """Runs of tokens of one kind: (supervised, masked or padding, ids)."""
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        kind = SUPERVISED if label != batches.MASKED else PADDING if token == pad else MASKED
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    return runs


def painted(
    tokenizer: Any, runs: Sequence[tuple[str, list[int]]], colour: bool = False, limit: int | None = None
) -> str:
    """The runs as text, coloured or between marks. limit: about how many characters; a long run loses its middle."""
    text = ""
    for kind, ids in runs:
        if limit and len(text) >= limit:
            return text + CUT
        before, after = (COLOURS[kind], "\033[0m") if colour else MARKS[kind]
        run, half = tokenizer.decode(ids), (limit or 0) // 4  # a prompt and its completion share the limit
        text += before + (f"{run[:half]}{CUT}{run[-half:]}" if limit and len(run) > 2 * half else run) + after
    return text


def marked(tokenizer: Any, row: Row) -> str:
    """A row as text, its supervised part between ⟦ and ⟧."""
    return painted(tokenizer, segments(row["input_ids"], row["labels"], tokenizer.pad_token_id))


def described(
    tokenizer: Any, batch: Mapping[str, Any], rows: Sequence[Row], colour: bool = False, limit: int | None = None
) -> Iterator[str]:
    """Lines for each of the batch's first rows: counts, text, and how much of it evaluation asks."""
    rest = iter(documents(batch))
    for number, row in enumerate(rows, 1):
        inside = list(itertools.islice(rest, len(_lengths(row))))
        supervised = sum(label != batches.MASKED for _, labels in inside for label in labels)
        several = f" in {len(inside)} documents" if len(inside) > 1 else ""
        yield f"--- row {number}: {len(row['input_ids'])} tokens{several}, {supervised} supervised"
        runs = [run for part in inside for run in segments(*part, tokenizer.pad_token_id)]
        yield painted(tokenizer, runs, colour, limit)
        for part in inside:
            if prompt := evaluation_prompt(tokenizer, *part):
                yield f"--- its evaluation prompt is exactly its first {len(prompt)} tokens"


def _excerpt(tokenizer: Any, row: Row) -> str:
    ids = [i if i >= 0 else tokenizer.unk_token_id for i in row["input_ids"]]
    labels = row["labels"] if len(row.get("labels", ())) == len(ids) else [batches.MASKED] * len(ids)
    return painted(tokenizer, segments(ids, labels, tokenizer.pad_token_id), limit=EXCERPT)


def documents(batch: Mapping[str, Any]) -> list[Document]:
    """(ids, labels) of each document of a collated batch, told apart by its restarting positions."""
    ids, labels, positions = (batch[key].flatten().tolist() for key in ("input_ids", "labels", "position_ids"))
    starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
    return [(ids[a:b], labels[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


def _lengths(row: Row) -> Sequence[int]:
    return row.get("seq_lengths", [len(row["input_ids"])])


# forbidden states ---------------------------------------------------------------------------------------


def problems_of(plan: Plan, tokenizer: Any, embedding_rows: int | None = None) -> list[str]:
    """Every forbidden state in the rows of a plan. Rows that repeat are inspected once."""
    found = []
    try:
        evaluation.letter_ids(tokenizer)
    except AssertionError as error:
        found.append(f"answer letter {error}")
    seen: set[int] = set()
    for number, row in enumerate(plan.rows, 1):
        if id(row) in seen:
            continue
        seen.add(id(row))
        if problems := row_problems(row, tokenizer, plan.packed, embedding_rows):
            shown = f"\n    {_excerpt(tokenizer, row)!r}" if len(found) < MOST_PROBLEMS else ""
            found.append(f"row {number}: {'; '.join(problems)}{shown}")
    return found


def row_problems(row: Row, tokenizer: Any, packed: bool, embedding_rows: int | None = None) -> list[str]:
    """The forbidden states of one row. packed: the stage's rows hold several documents each."""
    import numpy

    if "labels" not in row or not len(row["labels"]):
        return ["has no labels"]
    ids, labels = (numpy.asarray(row[name], dtype="i") for name in ("input_ids", "labels"))
    lengths = _lengths(row)
    if len(ids) != len(labels) or sum(lengths) != len(ids):
        return ["lengths differ"]
    found = []
    if ("seq_lengths" in row) != packed:
        found.append("a row that is not packed in a packed stage" if packed else "packed row in an unpacked stage")
    supervised = labels != batches.MASKED
    if not supervised[1:].any():
        found.append("nothing is supervised")
    padding = ids == tokenizer.pad_token_id
    if padding.any():
        found.append("padding is supervised" if (padding & supervised).any() else "holds padding before batching")
    if (labels != ids)[supervised].any():
        found.append("foreign label: the supervised token is not the one that stands there")
    starts = numpy.cumsum([0, *lengths[:-1]])
    begins = ids == tokenizer.bos_token_id
    if not begins[starts].all():
        found.append("no <bos> where a document begins")
    if begins.sum() > begins[starts].sum():
        found.append("doubled <bos>")
    if embedding_rows is not None and (outside := ids[(ids >= embedding_rows) | (ids < 0)]).size:
        found.append(f"token id {outside[0]} is outside of the model's {embedding_rows:,} rows")
    turns = ids == tokenizer.convert_tokens_to_ids(tokenizers.START_OF_TURN)
    if not found and turns.any():
        for start, length in zip(starts, lengths, strict=True):
            part = slice(start, start + length)
            if turns[part].any():
                found += _exchange_problems(tokenizer, ids[part].tolist(), labels[part].tolist())
    return found


def _exchange_problems(tokenizer: Any, ids: list[int], labels: list[int]) -> list[str]:
    """The forbidden states of one exchange, whose tokens are in order."""
    end = tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TURN)
    last = len(ids) - 1 - ids[::-1].index(end) if end in ids else 0
    if labels[last] != end or tokenizer.decode(ids[last + 1 :]).strip():
        return ["end of turn not supervised"]
    try:
        prompt = evaluation_prompt(tokenizer, ids, labels)
    except ValueError as error:
        return [str(error)]
    if prompt is None:
        return []
    completion = tokenizer.decode(ids[len(prompt) : last]).strip()
    if not completion:
        return ["the completion is empty"]
    # The user turn's content begins after the line "<bos><start_of_turn>user".
    user = tokenizer.decode(prompt).partition("\n")[2].rpartition(tokenizers.END_OF_TURN)[0]
    return exam_problems(user, completion) if prompts.is_mcq(user) else []


def evaluation_prompt(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[int] | None:
    """The evaluation prompt that matches an exchange row, rendered anew from its user turn; None for plain text.

    Raises ValueError when it is not the exact token prefix of the row at which supervision starts.
    """
    start_of_turn = tokenizer.convert_tokens_to_ids(tokenizers.START_OF_TURN)
    if start_of_turn not in ids:
        return None
    start = next((i for i, label in enumerate(labels) if label != batches.MASKED), len(labels))
    head = tokenizer.decode(ids[:start])
    user = head.partition(f"{tokenizers.START_OF_TURN}user\n")[2].rpartition(f"{tokenizers.END_OF_TURN}\n")[0]
    rendered, _ = prompts.render(tokenizer, user)
    if rendered != list(ids[:start]):
        at = next((i for i, (a, b) in enumerate(zip(rendered, ids, strict=False)) if a != b), min(len(rendered), start))
        asked, trained = (tokenizer.decode(list(tokens[at : at + 20])) for tokens in (rendered, ids[:start]))
        raise ValueError(f"the evaluation prompt is not its prefix: {asked!r} is asked where {trained!r} is masked")
    return rendered


_OPTION = re.compile(r"^([A-E])\) *\S", re.MULTILINE)
_NAMED = re.compile(r"\(([A-E](?:, [A-E])+) 중 하나\)")


def exam_problems(user: str, completion: str) -> list[str]:
    """What is wrong with an exam row: an option line that is not there, an answer that is no option.

    The direct form names its options; a reasoned row must end with four or five in order. Its example has some too.
    """
    lines, first = "".join(_OPTION.findall(user)), user.partition("\n")[0]
    named = _NAMED.search(first)
    letters = named[1].replace(", ", "") if named else "ABCDE" if lines.endswith("ABCDE") else "ABCD"
    found = []
    if not lines.endswith(letters):
        found.append(f"options {', '.join(letters)} are not all there: {user[-80:]!r}")
    answer = completion if named else completion.rpartition("</reasoning>")[2]
    if answer not in tuple(letters):
        found.append(f"the answer {answer[-80:]!r} is none of {', '.join(letters)}")
    return found


def problems_of_batch(batch: Mapping[str, Any], rows: Sequence[Row], pad: int) -> list[str]:
    """Forbidden states that only collation can bring about. batch: of `rows`, in their order."""
    found = []
    if "attention_mask" in batch:
        found.append("the batch has an attention mask: documents would attend to each other")
    if "position_ids" not in batch:
        return [*found, "the batch has no positions: documents would attend to each other"]
    parts = documents(batch)
    lengths = [length for row in rows for length in _lengths(row)]
    if [len(ids) for ids, _ in parts] != lengths:
        found.append(
            f"positions restart {len(parts)} times for {cli.count(len(lengths), 'document')}, or at other places: "
            "documents would attend to each other"
        )
    if [token for ids, _ in parts for token in ids if token != pad] != [i for row in rows for i in row["input_ids"]]:
        found.append("the batch holds other tokens than its rows")
    for number, (ids, labels) in enumerate(parts, 1):
        if labels[0] != batches.MASKED:
            found.append(f"document {number}: its first token is predicted from the document before it")
        if any(token == pad and label != batches.MASKED for token, label in zip(ids, labels, strict=True)):
            found.append(f"document {number}: padding is supervised")
        if all(label == batches.MASKED for label in labels):
            found.append(f"document {number}: nothing is supervised")
    return found

"""Rows to labels, packing, and their order.

The whole order of a stage's rows (epochs, shuffles, replay) is laid out before training and read sequentially, so
that an interrupted run continues with exactly the row it stopped before.

numpy, trl and datasets are imported inside functions.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medgemma_korean import prompts, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths, show

# input_ids and labels; a packed row has seq_lengths too. Four bytes a token: lists of Python integers take ten times as
# much, and a stage lays out 100 million tokens. A row that is supervised whole has one array under both names.
Row = dict[str, "array[int]"]
MASKED = -100
GROUP = 1000  # rows that are packed together, and that are handed to Arrow at once
REPLAYED = 5000  # texts a language from which replay is drawn: enough for any share; the real folders hold millions
MAX_DROPPED = 0.05  # share of rows that may be too long before a stage refuses to train on the rest


# rows ---------------------------------------------------------------------------------------------------


def exchange_row(tokenizer: Any, prompt: str, completion: str, max_length: int) -> Row | None:
    """One exchange; only the completion and its `<end_of_turn>\\n` are supervised. None when it is too long."""
    ids, start = prompts.render(tokenizer, prompt, completion)
    if len(ids) > max_length:
        return None
    return {"input_ids": array("i", ids), "labels": array("i", [MASKED] * start + ids[start:])}


def mcq_row(
    tokenizer: Any,
    item: dict[str, Any],
    max_length: int,
    build: Callable[[dict[str, Any]], tuple[str, str]],
    counts: dict[str, int],
) -> Row | None:
    """An exam question as a row. When it is too long the question loses its beginning, never options or answer.

    build: prompt and completion of an item. Counts "shortened" and "too_long".
    """
    row = exchange_row(tokenizer, *build(item), max_length)
    question = item["question"]
    while row is None and len(question) > 40:
        # A fifth at a time from the left: the sentence that asks stands at the end.
        question = question[max(len(question) // 5, 1) :]
        row = exchange_row(tokenizer, *build({**item, "question": "…" + question.lstrip()}), max_length)
        if row is not None:
            counts["shortened"] = counts.get("shortened", 0) + 1
    if row is None:
        counts["too_long"] = counts.get("too_long", 0) + 1
    return row


def text_rows(tokenizer: Any, texts: Iterable[str], max_length: int) -> Iterator[Row]:
    """Plain texts as rows: `<bos>` text `<eos>`, everything supervised; a long text becomes several rows."""
    width = max_length - 2  # room for <bos> and <eos>
    for ids in tokenizers.encode_all(tokenizer, texts):
        for start in range(0, len(ids), width):
            end = [tokenizer.eos_token_id] if start + width >= len(ids) else []
            part = array("i", [tokenizer.bos_token_id, *ids[start : start + width], *end])
            yield {"input_ids": part, "labels": part}


def pack(rows: Iterable[Row], max_length: int) -> list[Row]:
    """Pack rows into sequences of at most `max_length` tokens with `seq_lengths`: best fit first (TRL).

    Each group of 1,000 rows is packed by itself, so that only packed rows are held. Raises AssertionError for a row
    that is longer: the library would cut it.
    """
    from trl import pack_dataset

    packed: list[Row] = []
    for group in _groups(rows):
        assert all(len(row["input_ids"]) <= max_length for row in group), "a row is longer than a packed sequence"
        whole = all(row["labels"] is row["input_ids"] for row in group)
        found = pack_dataset(dataset(group, ("input_ids",) if whole else ("input_ids", "labels")), max_length, "bfd")
        columns = {name: list(_arrays(found.data.column(name))) for name in found.column_names}
        columns.setdefault("labels", columns["input_ids"])
        packed += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return packed


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rest = iter(rows)
    while group := list(itertools.islice(rest, GROUP)):
        yield group


def _arrays(column: Any) -> Iterator[array[int]]:
    """The lists of an Arrow column, each as an array of its own."""
    for chunk in column.chunks:
        starts, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        for start, end in zip(starts, starts[1:], strict=False):
            yield array("i", values[start:end].astype("i").tobytes())


def dataset(rows: Sequence[Row], names: Sequence[str] | None = None) -> Any:
    """The rows in their order as a `datasets.Dataset` of int32 lists. names: its columns (default: those of a row).

    A row that epochs or replay repeat stands there once.
    """
    import numpy
    import pyarrow
    from datasets import Dataset

    places: dict[int, int] = {}  # by identity: what repeats is the same object
    order = [places.setdefault(id(row), len(places)) for row in rows]
    columns: dict[str, list[Any]] = {name: [] for name in names or rows[0]}
    for group in _groups({id(row): row for row in rows}.values()):
        made: dict[tuple[int, ...], Any] = {}
        for name, chunks in columns.items():
            parts = [row[name] for row in group]
            key = tuple(map(id, parts))  # labels that are the ids themselves take no memory here either
            if key not in made:
                starts = numpy.cumsum([0, *map(len, parts)], dtype="i")
                values = numpy.concatenate([numpy.asarray(part, dtype="i") for part in parts])
                made[key] = pyarrow.ListArray.from_arrays(pyarrow.array(starts), pyarrow.array(values))
            chunks.append(made[key])
    table = pyarrow.table({name: pyarrow.chunked_array(chunks) for name, chunks in columns.items()})
    # Without a name of ours the library hashes the whole table to make one.
    found = Dataset(table, fingerprint="rows")
    return found if len(found) == len(order) else found.select(order, keep_in_memory=True)


def digest(rows: Sequence[Row]) -> str:
    """sha256 of the rows in their order: what they hold and what of it is supervised."""
    found = hashlib.sha256()
    for row in rows:
        for key in ("input_ids", "labels", "seq_lengths"):
            if key in row:
                found.update(array("i", row[key]).tobytes())
    return found.hexdigest()


def epochs_of(make: Callable[[int], list[Row]], epochs: int, seed: int) -> list[Row]:
    """The rows of all epochs in order; each epoch is made anew (`make(epoch)`) and shuffled with its own seed."""
    ordered: list[Row] = []
    for epoch in range(epochs):
        rows = list(make(epoch))
        random.Random(seed * 1000 + epoch).shuffle(rows)
        ordered += rows
    return ordered


def mixed(main: list[Row], replay: list[Row], share: float, seed: int) -> list[Row]:
    """`main` in its order with replay rows spread evenly until they hold `share` of the whole's tokens.

    Replay rows are taken in a seeded shuffle and repeated, shuffled anew, where they do not suffice.
    """
    if not share or not replay:
        return list(main)
    wanted = sum(len(row["input_ids"]) for row in main) * share / (1 - share)
    rng, chosen, queue, tokens = random.Random(seed), [], [], 0
    while tokens < wanted:
        if not queue:
            queue = list(replay)
            rng.shuffle(queue)
        chosen.append(queue.pop())
        tokens += len(chosen[-1]["input_ids"])
    # Even spacing keeps every batch a mix; a shuffle would leave runs without replay.
    keyed = [((i + 0.5) / len(main), 0, row) for i, row in enumerate(main)]
    keyed += [((i + 0.5) / len(chosen), 1, row) for i, row in enumerate(chosen)]
    return [row for *_, row in sorted(keyed, key=lambda entry: entry[:2])]


def read_texts(file: Path, seed: int, characters: int | None = None, limit: int | None = None) -> Iterator[str]:
    """The texts of a JSONL file in their order, one in memory at a time.

    Of a file that holds more than `characters`, a seeded share of about that many, taken from the file's size; of
    those at most `limit`, drawn by `seed` too, which takes a second pass. Raises PipelineError for a row without text.
    """
    # Hangul takes three bytes of UTF-8, Latin and the JSON around it one.
    there = max(file.stat().st_size, 1) / 3 if file.is_file() else 0
    share = 1.0 if characters is None or characters >= there else characters / there

    def chosen() -> Iterator[str]:
        rng = random.Random(seed)
        rows = records.read_jsonl(file, needs=("text",))
        return (row["text"] for row in rows if share == 1.0 or rng.random() < share)

    if limit is None or limit >= (texts := sum(1 for _ in chosen())):
        return chosen()
    drawn = set(_drawn(texts, limit, seed))
    return (text for number, text in enumerate(chosen()) if number in drawn)


def sample(rows: list[Any], limit: int | None, seed: int) -> list[Any]:
    """At most `limit` rows, drawn with a seed and kept in their order: never simply the first ones."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in _drawn(len(rows), limit, seed)]


def _drawn(there: int, limit: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(there), limit))


def reservoir(items: Iterable[Any], limit: int, seed: int) -> list[Any]:
    """At most `limit` items of a stream, each equally likely, in their order; no more are held (Vitter's R)."""
    rng, kept = random.Random(seed), []
    for number, item in enumerate(items):
        if number < limit:
            kept.append((number, item))
        elif (place := rng.randrange(number + 1)) < limit:
            kept[place] = (number, item)
    return [item for _, item in sorted(kept, key=lambda entry: entry[0])]


def replay_texts(tokenizer: Any, paths: RunPaths, max_length: int, seed: int) -> list[Row]:
    """Rows of stage-00 training text to replay against forgetting: as many Korean as English ones.

    Raises PipelineError where there are none.
    """
    rows: dict[str, list[Row]] = {}
    for folder in (paths.plain_text, paths.english_replay):
        texts = reservoir(read_texts(folder / "train.jsonl", seed), REPLAYED, seed)
        rows[folder.name] = list(text_rows(tokenizer, texts, max_length))
        if not rows[folder.name]:
            raise PipelineError(f"{show(folder / 'train.jsonl')}: no text to replay")
    size = min(map(len, rows.values()))
    return [row for found in rows.values() for row in sample(found, size, seed)]


def refuse_losses(program: str, dropped: int, total: int) -> None:
    """Raise PipelineError when more than 5 % of the rows are too long: the rest would be another data set."""
    if total and dropped / total > MAX_DROPPED:
        raise PipelineError(
            f"{program}: {dropped} of {total} rows are longer than --max-length; raise it "
            f"(at most {MAX_DROPPED:.0%} may be)"
        )

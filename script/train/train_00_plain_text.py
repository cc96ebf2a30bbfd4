"""Stage 00, continued pre-training on Korean plain text: first the new token rows alone, then rows and LoRA.

Reads   model/raw_lora_added/<name>/, data/02_refined/00_plain_text/, data/02_refined/00_english_replay/
Writes  model/00_trained/<name>/{final/,checkpoint-N/,training_info.json,evaluation.json,README.md}

    python script/train/train_00_plain_text.py --model tiny
    python script/train/train_00_plain_text.py --model medgemma-4b --max-samples 20000
    python script/train/train_00_plain_text.py --model tiny --max-characters 50000   # the same text for any tokenizer

English is replayed all the way, more of it while only rows train; documents are packed and do not see each other.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medgemma_korean import batches, chain, checkpoints, cli, evaluation, trained, training
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.stage import Input

PROGRAM = "train_00_plain_text"


def data(paths: RunPaths) -> list[Input]:
    english = Input("English replay", paths.english_replay, paths.record("refine_00_plain_text"))
    return [*chain.held_out_inputs(paths), english]


def packed(context: trained.Context, folder: Path, limit: int | None) -> tuple[list[batches.Row], int]:
    """The packed sequences of a folder's training documents, and how many characters they hold.

    Documents are read, encoded and packed one group after another: neither all texts nor all ids are held beside them.
    Raises PipelineError when there is no text.
    """
    settings, length, file = context.settings, context.settings.max_length, folder / "train.jsonl"
    # Four characters a token is more than any text here has, so the cap of rows can always be filled.
    characters = settings.max_rows * length * 4 * settings.epochs if settings.max_rows else None

    def texts() -> Iterator[str]:
        return batches.read_texts(file, context.seed, characters, limit)

    korean = folder == context.paths.plain_text
    most = context.args.max_characters if korean else None
    sizes: list[int] = []
    documents = measured(first_characters(texts, most, context.seed) if most else texts(), sizes)
    rows = batches.pack(batches.text_rows(context.tokenizer, documents, length), length)
    if not rows:
        raise PipelineError(f"{show(file)}: no text to train on")
    context.counts[folder.name] = len(sizes)
    return rows, sum(sizes)


def measured(documents: Iterable[str], sizes: list[int]) -> Iterator[str]:
    """The documents as they come, their lengths in characters added to `sizes`."""
    for text in documents:
        sizes.append(len(text))
        yield text


def first_characters(texts: Callable[[], Iterable[str]], most: int, seed: int) -> Iterator[str]:
    """Documents in a seeded order, the last one cut, of `most` characters together: the same for any tokenizer.

    texts: gives all documents, and is called twice: what is not chosen is never held. Raises PipelineError when there
    are fewer characters.
    """
    sizes = list(map(len, texts()))
    if sum(sizes) < most:
        raise PipelineError(
            f"--max-characters {most}: there are {sum(sizes):,} characters of Korean training text; ask for fewer"
        )
    order, cuts = list(range(len(sizes))), {}
    random.Random(seed).shuffle(order)
    while most > 0:
        number = order.pop()
        cuts[number] = most
        most -= sizes[number]
    chosen = {number: text[: cuts[number]] for number, text in enumerate(texts()) if number in cuts}
    return (chosen.pop(number) for number in cuts)


def build(context: trained.Context) -> training.Plan:
    settings, paths, args = context.settings, context.paths, context.args
    korean_once, characters = packed(context, paths.plain_text, args.max_samples)
    english, _ = packed(context, paths.english_replay, None)
    # A number of characters is a cap of its own: one of rows would hold other text for every tokenizer.
    most = None if args.max_characters else settings.max_rows
    korean = batches.epochs_of(
        lambda epoch: batches.sample(korean_once, most, context.seed + epoch),
        settings.epochs,
        context.seed,
    )
    # Two phases with their own share of English. The first is a share of all steps, so its Korean is the share
    # of the Korean sequences that those steps hold.
    first, r1, r2 = settings.rows_only_steps, settings.replay_rows_only, settings.replay
    cut = round(len(korean) * first * (1 - r1) / (first * (1 - r1) + (1 - first) * (1 - r2))) if first else 0
    head = batches.mixed(korean[:cut], english, r1, context.seed)
    rows = head + batches.mixed(korean[cut:], english, r2, context.seed + 1)
    used = len(korean) / (len(korean_once) * settings.epochs)  # where rows are capped, an estimate
    context.counts |= {
        "rows": len(rows),
        "korean_sequences": len(korean),
        "korean_characters": round(characters * settings.epochs * used),
    }
    texts = evaluation.held_out_texts(paths, context.profile)

    plan = training.Plan(
        rows=rows,
        settings=settings,
        packed=True,
        metric="korean_bits",
        larger=False,
        evaluate=lambda model: evaluation.text_look(model, context.tokenizer, texts, context.profile),
        seed=context.seed,
    )
    if settings.row_learning_rate > 0:
        # At most their share of the steps, so that a trial with --max-steps trains LoRA too.
        plan.rows_only_steps = min(len(head) // settings.batch, round(first * plan.steps))
    return plan


def moved_rows(context: trained.Context, model: Any, folder: Path, outcome: training.Outcome) -> dict[str, Any]:
    """How many of the new token rows moved. One whose token was never read was moved as a wrong answer alone."""
    start, best = checkpoints.Adapter(context.link.start), checkpoints.Adapter(outcome.best)
    if start.rows is None or best.rows is None:
        return {"token_rows": {"new": 0, "moved": 0, "never_read": 0}}
    moved = int((start.rows != best.rows).any(dim=1).sum())
    rows = context.plan.rows[: outcome.steps * context.settings.batch]
    never = len(set(start.ids).difference(*(row["input_ids"] for row in rows)))
    log.info("token rows: %s of %s moved; %s were never read", f"{moved:,}", f"{len(best.ids):,}", f"{never:,}")
    return {"token_rows": {"new": len(best.ids), "moved": moved, "never_read": never}}


def main(argv: list[str] | None = None) -> int:
    parser = trained.make_parser(__doc__)
    parser.add_argument(
        "--max-characters", type=cli.positive_int, metavar="N", help="train on N characters of Korean an epoch"
    )
    args = parser.parse_args(argv)
    return trained.run(
        args,
        program=PROGRAM,
        stage_name="train_00",
        stage_settings=lambda profile: profile.plain_text,
        output=lambda paths: paths.trained_00,
        data=data,
        build=build,
        choices={"max_characters": args.max_characters},
        finish=moved_rows,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

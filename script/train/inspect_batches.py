"""Shows what the model really sees in a training stage: which tokens are supervised, masked or padding.

Reads   model/tokenizer/<name>/ and the refined data of the stage; no model weights
Writes  nothing

    python script/train/inspect_batches.py --model tiny --stage 02 --rows 4

The rows are those of the stage's own program, put into a batch by the trainer's own collator. Colours on a terminal,
marks elsewhere: ⟦supervised⟧, ⟪padding⟫, the rest is masked. Exit code 2 when any row of the stage is in a state that
must be impossible.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from medgemma_korean import cli, evaluation, prompts, trained, training
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError
from medgemma_korean.profiles import ModelProfile

import train_00_plain_text
import train_01_medical_dict
import train_02_kor_med_test

STAGES = {
    "00": (train_00_plain_text.build, lambda profile: profile.plain_text),
    "01": (train_01_medical_dict.build, lambda profile: profile.dictionary),
    "02": (train_02_kor_med_test.build, lambda profile: profile.mcq),
}
SAMPLES = 1000  # rows of data laid out unless told otherwise: all of the sample, a view of a real folder
SUPERVISED, MASKED, PADDING = "supervised", "masked", "padding"
COLOURS = {SUPERVISED: "\033[1;32m", MASKED: "\033[2m", PADDING: "\033[41m"}
MARKS = {SUPERVISED: "⟦⟧", MASKED: ("", ""), PADDING: "⟪⟫"}
MOST_PROBLEMS = 10


def segments(ids: Sequence[int], labels: Sequence[int], pad: int) -> list[tuple[str, list[int]]]:
    """Runs of tokens of one kind: (supervised, masked or padding, ids)."""
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        kind = SUPERVISED if label != training.MASKED else PADDING if token == pad else MASKED
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    return runs


def painted(tokenizer: Any, runs: Sequence[tuple[str, list[int]]], colour: bool) -> str:
    text = ""
    for kind, ids in runs:
        before, after = (COLOURS[kind], "\033[0m") if colour else MARKS[kind]
        text += before + tokenizer.decode(ids) + after
    return text


def documents(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a collated batch, told apart by its restarting positions."""
    ids, labels, positions = (batch[key].flatten().tolist() for key in ("input_ids", "labels", "position_ids"))
    starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
    return [(ids[a:b], labels[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


def evaluation_prompt(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[int] | None:
    """The evaluation prompt that matches an exchange row, rendered anew from its user turn; None for plain text.

    Raises ValueError when it is not the exact token prefix of the row at which supervision starts.
    """
    start_of_turn = tokenizer.convert_tokens_to_ids(tokenizers.START_OF_TURN)
    if start_of_turn not in ids:
        return None
    start = next(i for i, label in enumerate(labels) if label != training.MASKED)
    head = tokenizer.decode(ids[:start])
    user = head.partition(f"{tokenizers.START_OF_TURN}user\n")[2].rpartition(f"{tokenizers.END_OF_TURN}\n")[0]
    rendered, _ = prompts.render(tokenizer, user)
    if rendered != list(ids[:start]):
        raise ValueError(
            f"the evaluation prompt is not the row's prefix: {tokenizer.decode(rendered)!r} against {head!r}"
        )
    return rendered


def problems_of(plan: training.Plan, tokenizer: Any) -> list[str]:
    """Every forbidden state in the rows of a plan, the first ones only."""
    found = []
    try:
        training.check_rows(plan.rows, tokenizer, plan.packed)
        evaluation.letter_ids(tokenizer)
    except AssertionError as error:
        found.append(str(error))
    for number, row in enumerate(plan.rows):
        if "seq_lengths" not in row:
            try:
                evaluation_prompt(tokenizer, row["input_ids"], row["labels"])
            except (ValueError, StopIteration) as error:
                found.append(f"row {number}: {error or 'nothing is supervised'}")
        if len(found) >= MOST_PROBLEMS:
            break
    return found


def problems_of_batch(batch: dict[str, Any], rows: Sequence[training.Row], pad: int) -> list[str]:
    """Forbidden states that only collation can bring about."""
    found = []
    if "attention_mask" in batch:
        found.append("the batch has an attention mask: documents would attend to each other")
    parts = documents(batch)
    expected = sum(len(row.get("seq_lengths", [0])) for row in rows)
    if len(parts) != expected:
        found.append(f"the batch restarts its positions {len(parts)} times for {expected} documents")
    for number, (ids, labels) in enumerate(parts):
        if labels[0] != training.MASKED:
            found.append(f"document {number}: its first token is predicted from the document before it")
        if any(token == pad and label != training.MASKED for token, label in zip(ids, labels, strict=True)):
            found.append(f"document {number}: padding is supervised")
    return found


def plan_of(args: argparse.Namespace, profile: ModelProfile, paths: Any, tokenizer: Any) -> training.Plan:
    build, settings = STAGES[args.stage]
    # A stage's rows depend on its data, settings and tokenizer alone, so no link of the chain is asked for.
    return build(trained.Context(args, profile, paths, settings(profile), tokenizer, None, {}))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, force=False)
    parser.add_argument("--stage", choices=tuple(STAGES), default="02", help="which stage (default: 02)")
    parser.add_argument("--rows", type=cli.positive_int, default=4, metavar="N", help="rows to show (default: 4)")
    parser.add_argument(
        "--max-samples", type=cli.positive_int, default=SAMPLES, metavar="N",
        help=f"lay out at most N rows of data, drawn as in training (default: {SAMPLES})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=trained.SEED, help="seed of order and shuffles, as in training")
    parser.set_defaults(eval_samples=None, max_characters=None)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    cli.start_logging(paths, "inspect_batches")
    evaluation.require_held_out(paths)
    tokenizer = tokenizers.load(paths.tokenizer)
    plan = plan_of(args, profile, paths, tokenizer)
    if not plan.rows:
        raise PipelineError(f"stage {args.stage}: no rows to train on")

    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    shown = plan.rows[: args.rows]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)(shown)
    colour = sys.stdout.isatty()
    for number, (ids, labels) in enumerate(documents(batch), 1):
        supervised = sum(label != training.MASKED for label in labels)
        print(f"--- document {number}: {len(ids)} tokens, {supervised} supervised")
        print(painted(tokenizer, segments(ids, labels, tokenizer.pad_token_id), colour))
        prompt = None if plan.packed else evaluation_prompt(tokenizer, ids, labels)
        # The user turn's content begins after the line "<bos><start_of_turn>user".
        if prompt and prompts.is_mcq(tokenizer.decode(prompt).partition("\n")[2]):
            print(f"--- its evaluation prompt, the row's first {len(prompt)} tokens\n{tokenizer.decode(prompt)}")
    problems = problems_of(plan, tokenizer) + problems_of_batch(batch, shown, tokenizer.pad_token_id)
    tokens = sum(len(row["input_ids"]) for row in plan.rows)
    labels = sum(label != training.MASKED for row in plan.rows for label in row["labels"])
    print(
        f"=== stage {args.stage}: {cli.count(len(plan.rows), 'row')}, {cli.count(tokens, 'token')}, "
        f"{labels / tokens:.1%} supervised, longest {max(len(row['input_ids']) for row in plan.rows)}"
    )
    if problems:
        raise PipelineError(f"stage {args.stage} holds forbidden states:\n  " + "\n  ".join(problems[:MOST_PROBLEMS]))
    print("no forbidden state")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

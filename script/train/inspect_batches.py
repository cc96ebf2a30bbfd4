"""Shows what the model really sees in a training stage: which tokens are supervised, masked or padding.

Reads   model/tokenizer/<name>/ and the refined data of the stage; no model weights
Writes  nothing

    python script/train/inspect_batches.py --model tiny --stage 02 --rows 4
    python script/train/inspect_batches.py --model tiny --stage loop

The rows are those of the stage's own program, put into a batch by the trainer's own collator. Colours on a terminal,
marks elsewhere: ⟦supervised⟧, ⟪padding⟫, the rest is masked. Exit code 2 when any row of the stage is in a state that
must be impossible; every training asks the same of its rows before its first step.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from medgemma_korean import batches, cli, evaluation, inspection, trained, training
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import show
from medgemma_korean.profiles import ModelProfile

import train_00_plain_text
import train_01_02_loop
import train_01_medical_dict
import train_02_kor_med_test

STAGES = {
    "00": (train_00_plain_text.build, lambda profile: profile.plain_text),
    "01": (train_01_medical_dict.build, lambda profile: profile.dictionary),
    "02": (train_02_kor_med_test.build, lambda profile: profile.mcq),
    "loop": (train_01_02_loop.build, train_01_02_loop.loop_settings),
}
SAMPLES = 1000  # rows of data laid out unless told otherwise: all of the sample, a view of a real folder


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
    parser.add_argument(
        "--seed", type=cli.seed, default=trained.SEED, help="seed of order and shuffles, as in training"
    )
    parser.set_defaults(eval_samples=None, max_characters=None, max_length=None, max_loops=1)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    cli.start_logging(paths, "inspect_batches")
    evaluation.require_held_out(paths)
    if not (paths.tokenizer / "tokenizer.json").is_file():
        again = paths.command("model/prepare_tokenizer")
        raise PipelineError(f"{show(paths.tokenizer)} does not exist or is incomplete; run: {again}")
    tokenizer = tokenizers.load(paths.tokenizer)
    plan = plan_of(args, profile, paths, tokenizer)
    if not plan.rows:
        raise PipelineError(f"stage {args.stage}: no rows to train on")

    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    inspection.refuse(inspection.problems_of(plan, tokenizer))  # which shows the rows that it refuses
    shown = plan.rows[: args.rows]
    batch = collator(list(batches.dataset(shown)))
    inspection.refuse(inspection.problems_of_batch(batch, shown, tokenizer.pad_token_id))
    for line in inspection.described(tokenizer, batch, shown, colour=sys.stdout.isatty()):
        print(line)
    tokens = sum(len(row["input_ids"]) for row in plan.rows)
    masked = sum(row["labels"].count(batches.MASKED) for row in plan.rows)
    print(
        f"=== stage {args.stage}: {cli.count(len(plan.rows), 'row')}, {cli.count(tokens, 'token')}, "
        f"{1 - masked / tokens:.1%} supervised, longest {max(len(row['input_ids']) for row in plan.rows)}"
    )
    print("no forbidden state")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

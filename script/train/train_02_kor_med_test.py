"""Stage 02: exam questions, on a fresh adapter over the merged base; the checkpoint is chosen on dev.

Reads   model/01_another_lora_added/<name>/, data/02_refined/02_kor_med_test/
Writes  model/02_trained/<name>/{final/,checkpoint-N/,training_info.json,evaluation.json,README.md}

    python script/train/train_02_kor_med_test.py --model tiny

Every question is trained with a bare letter as its answer, options shuffled anew in each epoch. A question that has
a real rationale is trained with reasoning too; none is ever invented.
"""

from __future__ import annotations

import random
import sys

from medgemma_korean import batches, chain, cli, evaluation, mcq, prompts, records, trained, training
from medgemma_korean.cli import log
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import Input

PROGRAM = "train_02_kor_med_test"
DETAILED = 0.05  # share of the reasoned rows in the detailed prompt form


def data(paths: RunPaths) -> list[Input]:
    dictionary = Input("dictionary", paths.dictionary, paths.record("refine_01_medical_dict"), optional=True)
    return [*chain.held_out_inputs(paths), dictionary]


def direct(item: dict) -> tuple[str, str]:
    return prompts.mcq_direct(item), item["answer"]


def epoch_rows(items: list[dict], epoch: int, context: trained.Context) -> list[batches.Row]:
    """All rows of one epoch: each item direct, and reasoned where it has a rationale, options in a new order."""
    rng = random.Random(f"{context.seed}/{epoch}")
    reasoned = [item for item in items if item.get("reasoning")]
    rows = []
    for item in batches.sample(items, context.settings.max_rows, context.seed + epoch):
        order = list(range(len(prompts.letters_of(item))))
        if not getattr(context.args, "keep_option_order", False):
            rng.shuffle(order)
        shuffled = prompts.shuffled(item, order)
        forms = [direct]
        if item.get("reasoning"):
            others = [other for other in reasoned if other is not item]
            example = rng.choice(others) if others and rng.random() < DETAILED else None
            context.counts["detailed" if example else "simple"] = (
                context.counts.get("detailed" if example else "simple", 0) + 1
            )
            forms.append(lambda i, e=example: (prompts.mcq_reasoning(i, e), prompts.mcq_reasoned_answer(i)))
        for form in forms:
            row = batches.mcq_row(context.tokenizer, shuffled, context.settings.max_length, form, context.counts)
            if row is not None:
                rows.append(row)
    return rows


def build(context: trained.Context) -> training.Plan:
    settings, paths, tokenizer, profile = context.settings, context.paths, context.tokenizer, context.profile
    items = batches.sample(mcq.read_items(paths.mcq / "train.jsonl"), context.args.max_samples, context.seed)
    rows = batches.epochs_of(lambda epoch: epoch_rows(items, epoch, context), settings.epochs, context.seed)
    batches.refuse_losses(PROGRAM, context.counts.get("too_long", 0), context.counts.get("too_long", 0) + len(rows))
    replay = batches.replay_texts(tokenizer, paths, settings.max_length, context.seed)
    replay += dictionary_rows(context)
    mixed = batches.mixed(rows, replay, settings.replay, context.seed)
    rationales = sum(1 for item in items if item.get("reasoning"))
    context.counts |= {"items": len(items), "rationales": rationales, "rows": len(mixed)}
    log.info("stage 02 rows: %s", context.counts)
    dev = evaluation.dev_items(paths, context.args.eval_samples)
    texts = evaluation.held_out_texts(paths, profile)

    def monitor(model) -> dict:
        return evaluation.text_look(model, tokenizer, texts, profile)

    return training.Plan(
        rows=mixed,
        settings=settings,
        packed=False,
        metric="accuracy",
        larger=True,
        evaluate=lambda model: evaluation.dev_look(model, tokenizer, dev, profile.score_batch) | monitor(model),
        monitor=monitor,
        seed=context.seed,
    )


def dictionary_rows(context: trained.Context) -> list[batches.Row]:
    """Dictionary rows of stage 01, replayed where there is a dictionary."""
    if not context.paths.dictionary.is_file():
        return []
    length = context.settings.max_length
    found = (
        batches.exchange_row(context.tokenizer, prompts.dictionary(row["term"]), row["definition"], length)
        for row in records.read_list(context.paths.dictionary, needs=("term", "definition"))
    )
    return [row for row in found if row is not None]


def main(argv: list[str] | None = None) -> int:
    parser = trained.make_parser(__doc__)
    parser.add_argument(
        "--keep-option-order", action="store_true", help="never shuffle the options: to see whether a model can learn"
    )
    args = parser.parse_args(argv)
    return trained.run(
        args,
        program=PROGRAM,
        stage_name="train_02",
        stage_settings=lambda profile: profile.mcq,
        output=lambda paths: paths.trained_02,
        data=data,
        build=build,
        choices={"keep_option_order": True} if args.keep_option_order else None,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Stage 00, continued pre-training on Korean plain text: first the new token rows alone, then rows and LoRA.

Reads   model/raw_lora_added/<name>/, data/02_refined/00_plain_text/, data/02_refined/00_english_replay/
Writes  model/00_trained/<name>/{final/,checkpoint-N/,training_info.json,evaluation.json,README.md}

    python script/train/train_00_plain_text.py --model tiny
    python script/train/train_00_plain_text.py --model medgemma-4b --max-samples 20000

English is replayed all the way, more of it while only rows train; documents are packed and do not see each other.
"""

from __future__ import annotations

import sys

from medgemma_korean import chain, cli, evaluation, trained, training
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import Input

PROGRAM = "train_00_plain_text"


def data(paths: RunPaths) -> list[Input]:
    english = Input("English replay", paths.english_replay, paths.record("refine_00_plain_text"))
    return [*chain.held_out_inputs(paths), english]


def packed(context: trained.Context, folder, limit: int | None) -> list[training.Row]:
    """The packed sequences of a folder's training documents."""
    settings, length = context.settings, context.settings.max_length
    # Four characters a token is more than any text here has, so the cap of rows can always be filled.
    characters = settings.max_rows * length * 4 * settings.epochs if settings.max_rows else None
    documents = training.sample(
        training.read_texts(folder / "train.jsonl", characters, context.seed), limit, context.seed
    )
    context.counts[folder.name] = len(documents)
    rows = [row for text in documents for row in training.text_rows(context.tokenizer, text, length)]
    return training.pack(rows, length)


def build(context: trained.Context) -> training.Plan:
    settings, paths = context.settings, context.paths
    korean_once = packed(context, paths.plain_text, context.args.max_samples)
    english = packed(context, paths.english_replay, None)
    korean = training.epochs_of(
        lambda epoch: training.sample(korean_once, settings.max_rows, context.seed + epoch),
        settings.epochs,
        context.seed,
    )
    # Two phases with their own share of English. The first is a share of all steps, so its Korean is the share
    # of the Korean sequences that those steps hold.
    first, r1, r2 = settings.rows_only_steps, settings.replay_rows_only, settings.replay
    cut = round(len(korean) * first * (1 - r1) / (first * (1 - r1) + (1 - first) * (1 - r2))) if first else 0
    head = training.mixed(korean[:cut], english, r1, context.seed)
    rows = head + training.mixed(korean[cut:], english, r2, context.seed + 1)
    context.counts |= {"rows": len(rows), "korean_sequences": len(korean)}
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


def main(argv: list[str] | None = None) -> int:
    args = trained.make_parser(__doc__).parse_args(argv)
    return trained.run(
        args,
        program=PROGRAM,
        stage_name="train_00",
        stage_settings=lambda profile: profile.plain_text,
        output=lambda paths: paths.trained_00,
        data=data,
        build=build,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

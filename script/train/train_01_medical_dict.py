"""Stage 01: the medical dictionary in both directions, symbols, and translation, on the adapter of stage 00.

Reads   model/00_trained/<name>/, data/02_refined/{01_medical_dict.json,02_char_dict.json,01_english_korean/}
Writes  model/01_trained/<name>/{final/,checkpoint-N/,training_info.json,evaluation.json,README.md}

    python script/train/train_01_medical_dict.py --model tiny

Korean and English text of stage 00 is replayed, and held-out text is watched: when it takes more than
`--max-forgetting` more bits per character than before, training ends and the best checkpoint before that is the result.
"""

from __future__ import annotations

import hashlib
import sys

from medgemma_korean import batches, chain, cli, evaluation, prompts, records, trained, training
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary import reversible
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import Input

PROGRAM = "train_01_medical_dict"
ENTRY = ("term", "definition")  # keys of dictionary and symbols
HELD_OUT = 0.05  # share of terms and pairs, by hash, on which the best checkpoint is chosen


def data(paths: RunPaths) -> list[Input]:
    refine = paths.command("refine/refine_all")
    return [
        *chain.held_out_inputs(paths),
        Input("dictionary", paths.dictionary, paths.record("refine_01_medical_dict"), refine),
        Input("pairs", paths.pairs, paths.record("refine_01_english_korean"), refine),
    ]


def exchanges(paths: RunPaths, counts: dict) -> list[tuple[str, str, str]]:
    """(key, prompt, completion) of everything that stage 01 asks; rows of one key are held out together."""
    dictionary = records.read_list(paths.dictionary, needs=ENTRY)
    symbols = records.read_list(paths.characters, needs=ENTRY)
    pairs = list(records.read_jsonl(paths.pairs / "en_to_ko.jsonl", needs=("source", "target")))
    found = [(row["term"], prompts.dictionary(row["term"]), row["definition"]) for row in dictionary + symbols]
    backwards = reversible(dictionary)
    found += [(row["term"], prompts.dictionary_reverse(row["definition"]), row["term"]) for row in backwards]
    for row in pairs:
        found.append((row["source"], prompts.to_korean(row["source"]), row["target"]))
        found.append((row["source"], prompts.to_english(row["target"]), row["source"]))
    counts |= {"terms": len(dictionary), "reverse": len(backwards), "symbols": len(symbols), "pairs": len(pairs)}
    return found


def is_held_out(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 < HELD_OUT


def build(context: trained.Context) -> training.Plan:
    settings, paths, tokenizer, profile = context.settings, context.paths, context.tokenizer, context.profile
    rows: list[batches.Row] = []
    validation: list[batches.Row] = []
    dropped = 0
    for key, prompt, completion in exchanges(paths, context.counts):
        row = batches.exchange_row(tokenizer, prompt, completion, settings.max_length)
        if row is None:
            dropped += 1
        else:
            (validation if is_held_out(key) else rows).append(row)
    batches.refuse_losses(PROGRAM, dropped, dropped + len(rows) + len(validation))
    if not validation:
        raise PipelineError("no dictionary entry or pair is held out; the data is too small to choose a checkpoint on")
    rows = batches.sample(rows, context.args.max_samples, context.seed)
    main_rows = batches.epochs_of(
        lambda epoch: batches.sample(rows, settings.max_rows, context.seed + epoch), settings.epochs, context.seed
    )
    replay = batches.replay_texts(tokenizer, paths, settings.max_length, context.seed)
    mixed = batches.mixed(main_rows, replay, settings.replay, context.seed)
    context.counts |= {"rows": len(mixed), "held_out": len(validation), "too_long": dropped}
    log.info("stage 01 rows: %s", context.counts)
    texts = evaluation.held_out_texts(paths, profile)
    items = evaluation.dev_items(paths, context.args.eval_samples)

    def monitor(model) -> dict:
        return evaluation.text_look(model, tokenizer, texts, profile)

    def look(model) -> dict:
        dev = evaluation.dev_look(model, tokenizer, items, profile.score_batch)
        loss = evaluation.completion_loss(model, validation, tokenizer, profile.score_batch)
        return {**dev, "loss": loss, **monitor(model)}

    return training.Plan(
        rows=mixed,
        settings=settings,
        packed=False,
        metric="loss",
        larger=False,
        evaluate=look,
        monitor=monitor,
        seed=context.seed,
    )


def main(argv: list[str] | None = None) -> int:
    args = trained.make_parser(__doc__).parse_args(argv)
    return trained.run(
        args,
        program=PROGRAM,
        stage_name="train_01",
        stage_settings=lambda profile: profile.dictionary,
        output=lambda paths: paths.trained_01,
        data=data,
        build=build,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

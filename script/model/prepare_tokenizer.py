"""Extend the base tokenizer for Korean medicine by continuing its own merges over the refined training text.

Reads   model/raw/<model>/, data/02_refined/ (training parts only; never dev, test or validation)
Writes  model/tokenizer/<name>/ : tokenizer.json, tokenizer.model where the base has one, new_tokens.txt,
        tokenizer_info.json

    python script/model/prepare_tokenizer.py --model tiny
    python script/model/prepare_tokenizer.py --model tiny --new-tokens 0    # keep the base vocabulary
"""

from __future__ import annotations

import argparse
import sys

from medgemma_korean import cli, prompts, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import Input, Stage

FORMAT = 1
ENGLISH_AND_CODE = (
    "The patient was discharged on day 3 with stable vital signs.",
    "def dose(weight_kg: float) -> float:\n    return 15 * weight_kg  # mg\n",
    "pH 7.35-7.45, PaCO2 35-45 mmHg; HbA1c >= 6.5 %",
    "𝒳 🙂 \u0000 ½ Ⅱ ℃ μg\t\ttabs\n\n\nlines",
)


def training_texts(paths: RunPaths) -> tuple[list[str], list[str]]:
    """(text of the training mix, dictionary texts to weigh more). Raises PipelineError when the mix is empty."""
    plain = [row["text"] for row in records.read_jsonl(paths.plain_text / "train.jsonl")]
    plain += [f"{i['question']}\n{prompts.options(i)}" for i in records.read_jsonl(paths.mcq / "train.jsonl")]
    if paths.pairs.is_dir():
        plain += [row["source"] for row in records.read_jsonl(paths.pairs / "ko_to_en.jsonl")]
    entries = records.read_json(paths.dictionary) if paths.dictionary.is_file() else []
    medical = [f"{row['term']} {row['definition']}" for row in entries]
    if not plain:
        raise PipelineError(f"{show(paths.refined)}: no training text to learn merges from")
    return plain, medical


def held_out(paths: RunPaths) -> dict[str, list[str]]:
    return {
        "korean": [row["text"] for row in records.read_jsonl(paths.plain_text / "validation.jsonl")],
        "medical": [f"{i['question']}\n{prompts.options(i)}" for i in records.read_jsonl(paths.mcq / "dev.jsonl")],
        "english": [row["text"] for row in records.read_jsonl(paths.english_replay / "validation.jsonl")],
    }


def planned_passes(profile: ModelProfile, plain: list[str], base) -> float:
    """How often the planned stage 00 reads the mix: its epochs, or less where they are capped."""
    from medgemma_korean import tokenizer as tokenizers

    stage = profile.plain_text
    if stage.max_rows is None:
        return float(stage.epochs)
    some = plain[:: max(1, len(plain) // 200)]
    tokens = tokenizers.tokens_per_character(base, some) * sum(map(len, plain))
    return stage.epochs * min(1.0, stage.max_rows * stage.max_length / tokens)


def learn(plain: list[str], medical: list[str], base, limit: int, min_count: float, weight: int, passes: float):
    """Continued BPE over the mix. min_count is over the planned stage 00, which reads the mix `passes` times."""
    from medgemma_korean import tokenizer as tokenizers

    words = tokenizers.count_words(plain)
    tokenizers.count_words(medical, weight=weight, into=words)

    def segment(word: str) -> list[str]:
        return base.convert_ids_to_tokens(tokenizers.encode(base, word.replace("▁", " ")))

    return tokenizers.continue_bpe(words, segment, set(base.get_vocab()), limit, min_count / passes)


def use_in_training(extended, pieces: list[str], texts: list[str], passes: float) -> dict[str, float]:
    """How often the new tokens occur in the mix, times the planned passes over it."""
    from collections import Counter

    from medgemma_korean import tokenizer as tokenizers

    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizers.encode(extended, text))
    uses = sorted(round(counts[i] * passes, 1) for i in extended.convert_tokens_to_ids(pieces))
    return {
        "unused": sum(n == 0 for n in uses),
        "updates_5th_percentile": uses[len(uses) // 20] if uses else 0,
        "updates_median": uses[len(uses) // 2] if uses else 0,
    }


def verdict(before: dict[str, float], after: dict[str, float], new: int) -> tuple[str, str]:
    """("EXTEND" or "DO NOT EXTEND", reason): the proposed threshold is 13 % fewer tokens on medical held-out text."""
    if new == 0:
        return "DO NOT EXTEND", "no new tokens were asked for, or none occurs often enough"
    gain = 1 - after["medical"] / before["medical"]
    word = "EXTEND" if gain >= 0.13 else "DO NOT EXTEND"
    return word, f"{gain:.1%} fewer tokens on held-out medical text (13 % asked for)"


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--new-tokens", type=int, metavar="N", help="most new tokens; 0 keeps the base vocabulary")
    parser.add_argument("--min-count", type=cli.positive_int, metavar="N", help="occurrences a new token needs")
    return parser


def build(args: argparse.Namespace, profile: ModelProfile, paths: RunPaths, stage: Stage, settings: dict) -> None:
    from medgemma_korean import tokenizer as tokenizers

    base = tokenizers.load(paths.raw_model)
    plain, medical = training_texts(paths)
    passes = planned_passes(profile, plain, base)
    with stage.work() as folder:
        limit = settings["new_tokens"]
        extension = learn(plain, medical, base, limit, settings["min_count"], profile.medical_weight, passes)
        tokenizers.write_extended(paths.raw_model, folder, extension)
        extended, pieces = tokenizers.load(folder), extension.pieces
        texts = held_out(paths)
        samples = [*ENGLISH_AND_CODE, *plain[:200], *texts["english"][:50]]
        if wrong := tokenizers.check_extended(base, extended, pieces, samples):
            raise AssertionError("the extended tokenizer is not sound: " + "; ".join(wrong[:5]))
        before = {name: tokenizers.tokens_per_character(base, t) for name, t in texts.items()}
        after = {name: tokenizers.tokens_per_character(extended, t) for name, t in texts.items()}
        word, reason = verdict(before, after, len(pieces))
        use = use_in_training(extended, pieces, plain + medical, passes)
        records.write_text(folder / "new_tokens.txt", "".join(f"{piece}\n" for piece in pieces))
        records.write_json(
            folder / "tokenizer_info.json",
            {
                "base_vocab": len(base),
                "new_tokens": len(pieces),
                "new_syllables": len(extension.syllables),
                "vocab": len(extended),
                "rows": tokenizers.rows_for(len(extended)),
                "tokens_per_character": {"base": before, "extended": after},
                "use": use,
                "verdict": word,
                "reason": reason,
                "base_sha256": tokenizers.fingerprint(paths.raw_model),
                "sha256": tokenizers.fingerprint(folder),
            },
        )
        rows = [[n, f"{before[n]:.3f}", f"{after[n]:.3f}", f"{after[n] / before[n] - 1:+.1%}"] for n in texts]
        log.info("%s", cli.table(rows, ["tokens per character", "base", "extended", "change"]))
        log.info(
            "%s new tokens (%d whole syllables), %d unused, median %d updates planned",
            f"{len(pieces):,}", len(extension.syllables), use["unused"], use["updates_median"],
        )  # fmt: skip
        log.info("verdict: %s (%s)", word, reason)
        if word != "EXTEND" and pieces:
            stage.warnings.append(f"tokenizer verdict: {word} ({reason})")
        stage.complete(
            counts={"new_tokens": len(pieces), "documents": len(plain) + len(medical)},
            scores={"before": before, "after": after},
            metric=f"{len(pieces):,} new tokens, medical text {after['medical'] / before['medical'] - 1:+.1%} tokens",
        )


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.new_tokens is not None and args.new_tokens < 0:
        raise PipelineError("--new-tokens must be 0 or more")
    cli.start_logging(paths, "prepare_tokenizer")
    settings = {
        "new_tokens": profile.new_tokens if args.new_tokens is None else args.new_tokens,
        "min_count": args.min_count or profile.min_count,
        "medical_weight": profile.medical_weight,
        "epochs": profile.plain_text.epochs,
        "max_rows": profile.plain_text.max_rows,
    }
    refine = paths.command("refine/refine_all")
    stage = Stage(
        "prepare_tokenizer",
        paths,
        outputs=[paths.tokenizer],
        inputs=[
            raw_model_input(paths),
            Input("plain text", paths.plain_text, paths.record("refine_00_plain_text"), refine),
            Input("exam questions", paths.mcq, paths.record("refine_02_kor_med_test"), refine),
            Input("dictionary", paths.dictionary, paths.record("refine_01_medical_dict"), optional=True),
            Input("pairs", paths.pairs, paths.record("refine_01_english_korean"), optional=True),
        ],
        settings=settings,
        format=FORMAT,
        force=args.force,
        record_inside=True,
    )
    if (code := stage.already_complete()) is not None:
        return code
    build(args, profile, paths, stage, settings)
    return 0


def raw_model_input(paths: RunPaths) -> Input:
    repair = paths.command("download/download_model")
    return Input("raw model", paths.raw_model, paths.raw_model / "stage.json", repair)


if __name__ == "__main__":
    sys.exit(cli.run(main))

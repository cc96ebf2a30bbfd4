"""Bits per character and perplexity of one or more models on held-out Korean, medical Korean and English text.

Reads   the models of a run, data/02_refined/{00_plain_text,00_english_replay}/validation.jsonl, dev questions
Writes  model/report/<name>/validation_plain_text.json

    python script/evaluate/validation_plain_text.py --model tiny
    python script/evaluate/validation_plain_text.py --model tiny --models base 02 model/01_02_loop/tiny

Bits per character compare models with different tokenizers; perplexity is a value a token and does not, so it stands
beside them and decides nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

from medgemma_korean import cli, evaluation, precision, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.stage import vouch
from medgemma_korean.ticker import Ticker

OUTPUT = "validation_plain_text.json"


def perplexity(bits_per_character: float, tokens_per_character: float) -> float:
    """exp of the mean negative log-likelihood a token: 2 ^ (bits a character / tokens a character)."""
    return 2 ** (bits_per_character / tokens_per_character)


def measured(
    model: Any, tokenizer: Any, texts: dict[str, list[str]], window: int, batch: int, which: str = "model"
) -> dict[str, Any]:
    """Bits and tokens per character and perplexity by language. Raises PipelineError for a value that is not finite."""
    bits = {}
    for name, text in texts.items():
        with Ticker(f"{which}, {name}") as tick:
            bits[name] = evaluation.bits_per_character(model, tokenizer, text, window, batch, tick)
    if not all(map(math.isfinite, bits.values())):
        raise PipelineError(f"bits per character are not finite ({bits}); the model is broken")
    tokens = {name: tokenizers.tokens_per_character(tokenizer, text) for name, text in texts.items()}
    return {
        "bits_per_character": bits,
        "perplexity": {name: perplexity(bits[name], tokens[name]) for name in texts},
        "tokens_per_character": tokens,
    }


def rows(models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a model: bits per character with the change against the first one, then perplexities."""
    first = next(iter(models.values()))["bits_per_character"]
    result = []
    for name, found in models.items():
        bits = found["bits_per_character"]
        changes = [f"{bits[k]:.3f} ({bits[k] / first[k] - 1:+.1%})" for k in evaluation.LANGUAGES]
        result.append([name, *changes, *(f"{found['perplexity'][k]:.1f}" for k in evaluation.LANGUAGES)])
    return result


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True, force=False)
    parser.add_argument(
        "--models", nargs="+", metavar="M", help="base extended 00 01 merged 02, folders, or hub ids (default: all)"
    )
    parser.add_argument("--precision", choices=("auto", "8bit", "nf4", "bf16", "fp32"), default="auto")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    begun = time.monotonic()
    cli.start_logging(paths, "validation_plain_text")
    evaluation.require_held_out(paths)
    candidates = evaluation.candidates(paths, args.models)
    asked = precision.of_run(args.precision, paths, profile)

    from medgemma_korean import modeling

    modeling.set_up_torch(seed=17)
    texts = evaluation.held_out_texts(paths, profile)
    models = {}
    for candidate, model, tokenizer in evaluation.loaded(candidates, profile, modeling.pick_device(args.device), asked):
        log.info("%s: %s", candidate.name, show(candidate.adapter or candidate.base))
        models[candidate.name] = measured(
            model, tokenizer, texts, profile.score_window, profile.score_batch, candidate.name
        )
        del model  # room for the next

    result = {
        "precision": asked,
        "window": profile.score_window,
        "texts": {
            name: {"documents": len(t), "characters": sum(map(len, t)), "sha256": records.digest_of(t)}
            for name, t in texts.items()
        },
        "models": models,
    }
    records.write_json(paths.report / OUTPUT, result)
    vouch("validation_plain_text", [paths.report / OUTPUT], time.monotonic() - begun)
    header = ["model", *(f"bits/char {k}" for k in evaluation.LANGUAGES), *(f"ppl {k}" for k in evaluation.LANGUAGES)]
    log.info("\n%s\n", cli.table(rows(models), header))
    log.info("precision %s; lower is better; written to %s", asked, show(paths.report / OUTPUT))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

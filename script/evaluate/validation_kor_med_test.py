"""KorMedMCQA accuracy of one or more models, on dev or, with --final, on test.

Reads   the models of a run, data/02_refined/02_kor_med_test/{dev,test}.jsonl
Writes  model/report/<name>/validation/<split>-<mode>[...].json and a .jsonl of every answer for each model
        model/report/<name>/test_looks.json, one entry for every time the test split was opened

    python script/evaluate/validation_kor_med_test.py --model tiny
    python script/evaluate/validation_kor_med_test.py --model tiny --models base 02 --mode generate --exams doctor
    python script/evaluate/validation_kor_med_test.py --model medgemma-4b --models base 02 --final

Letter mode takes the option letter with the highest log-probability; generate mode lets the model answer and extracts
the letter, and what has none counts as wrong. All models see the same items in the same precision; the first one is
what the others are compared with (exact McNemar). Choose on dev: every look at test is counted.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medgemma_korean import batches, cli, evaluation, mcq, precision, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile

PROGRAM = "validation_kor_med_test"
SEED = 17
ANSWER_TOKENS = 64  # generate mode: a bare letter needs 2; an untrained model may add its option and a sentence


def chosen_items(
    items: Sequence[dict[str, Any]], exams: Sequence[str] | None, limit: int | None
) -> list[dict[str, Any]]:
    """Items of those exams, at most `limit` drawn by a fixed seed. Raises PipelineError for an unknown exam."""
    known = sorted({item["exam"] for item in items})
    if unknown := sorted(set(exams or ()) - set(known)):
        raise PipelineError(f"--exams {' '.join(unknown)}: the split has {', '.join(known)}")
    return batches.sample([item for item in items if not exams or item["exam"] in exams], limit, SEED)


def label(split: str, mode: str, exams: Sequence[str] | None, limit: int | None) -> str:
    """The files' name: a part of a split never overwrites the scores of the whole."""
    return "-".join([split, mode, *sorted(set(exams or ())), *([f"limit{limit}"] if limit else [])])


def count_look(paths: RunPaths, **what: Any) -> int:
    """Record a look at the test split before a score of it exists; returns how many there are by now."""
    file = paths.report / "test_looks.json"
    looks = records.read_json(file) if file.is_file() else []
    looks.append({"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **what})
    records.write_json(file, looks)
    return len(looks)


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a model: accuracy with interval, baseline, unparsed, McNemar against the first, then each exam."""
    result = []
    for name, found in results.items():
        score, change = found["mcq"], found.get("against_first")
        result.append(
            [
                name,
                f"{score['correct']}/{score['n']}",
                f"{score['accuracy']:.1%} ({score['lower']:.1%} to {score['upper']:.1%})",
                f"{score['majority_accuracy']:.1%} ({score['majority_letter']})",
                "within chance" if mcq.within_chance(score) else "above chance",
                str(score["unparsed"]),
                f"{change['accuracy_change']:+.1%}, p {change['p']:.2g}" if change else "",
                *(f"{exam['accuracy']:.1%}" for exam in score["exams"].values()),
            ]
        )
    return result


def histogram(score: dict[str, Any]) -> str:
    """The predicted letters beside the gold ones, and the alarm."""
    letters = " ".join(f"{k} {score['predicted'][k]}/{score['gold'].get(k, 0)}" for k in score["predicted"])
    alarm = f"; more than {mcq.ALARM_SHARE:.0%} of the answers are {score['alarm']}" if score["alarm"] else ""
    return f"predicted/gold {letters}{alarm}"


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True, force=False)
    parser.add_argument(
        "--models", nargs="+", metavar="M", help="base extended 00 01 merged 02, or folders (default: all there are)"
    )
    parser.add_argument("--final", action="store_true", help="open the test split; the look is counted")
    parser.add_argument("--mode", choices=("letter", "generate"), default="letter")
    parser.add_argument("--exams", nargs="+", metavar="E", help="only these exams: doctor nurse pharm dentist")
    parser.add_argument("--limit", type=cli.positive_int, metavar="N", help="only N items, drawn by a fixed seed")
    parser.add_argument(
        "--max-new-tokens", type=cli.positive_int, default=ANSWER_TOKENS, metavar="N",
        help=f"longest answer in generate mode (default: {ANSWER_TOKENS})",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("auto", "8bit", "nf4", "bf16", "fp32"), default="auto")
    return parser


def score(
    args: argparse.Namespace,
    profile: ModelProfile,
    paths: RunPaths,
    candidates: list[evaluation.Candidate],
    items: list[dict[str, Any]],
    split: str,
) -> dict[str, dict[str, Any]]:
    """Score every model of the call and write its answers; returns the results without them."""
    from medgemma_korean import modeling

    modeling.set_up_torch(SEED)
    asked = precision.chosen(paths.raw_lora_added / "base", profile) if args.precision == "auto" else args.precision
    name = label(split, args.mode, args.exams, args.limit)
    first: dict[str, Any] | None = None
    results = {}
    for candidate, model, tokenizer in evaluation.loaded(candidates, profile, modeling.pick_device(args.device), asked):
        minute = cli.Every(60)

        def tick(done: int, total: int, which: str = candidate.name, minute: cli.Every = minute) -> None:
            if minute():
                log.info("%s: %d of %d", which, done, total)

        if args.mode == "letter":
            predictions = evaluation.score_letters(model, tokenizer, items, profile.score_batch, tick)
        else:
            predictions = evaluation.generate_letters(
                model, tokenizer, items, profile.score_batch, args.max_new_tokens, tick
            )
        del model  # room for the next
        assert len(predictions) == len(items), "items were lost"
        result = {
            "which": candidate.name,
            "model": show(candidate.adapter or candidate.base),
            "precision": asked,
            "protocol": args.mode,
            "split": split,
            "items": records.digest_of([[item["id"], item["question"]] for item in items]),
            "mcq": mcq.score(predictions),
        }
        whole = {**result, "predictions": predictions}
        if first is None:
            first = whole
        else:
            result["against_first"] = evaluation.compare(first, whole)
        records.write_jsonl(validation_folder(paths) / f"{name}-{candidate.name}.jsonl", predictions)
        log.info("%s: %s", candidate.name, histogram(result["mcq"]))
        results[candidate.name] = result
    return results


def validation_folder(paths: RunPaths) -> Path:
    return paths.report / "validation"


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    cli.start_logging(paths, PROGRAM)
    evaluation.require_held_out(paths)
    # Wrong names are found before the look, so that a slip costs none.
    candidates = evaluation.candidates(paths, args.models)
    split = "test" if args.final else "dev"
    items = chosen_items(mcq.read_items(paths.mcq / f"{split}.jsonl", also=("id", "exam")), args.exams, args.limit)
    if not items:
        raise PipelineError(f"{show(paths.mcq / f'{split}.jsonl')}: no questions; nothing could be scored")
    looks = None
    if args.final:
        names = [candidate.name for candidate in candidates]
        looks = count_look(paths, program=PROGRAM, models=names, mode=args.mode, exams=args.exams, limit=args.limit)
        log.warning("look %d at the test split of run %s", looks, paths.name)

    results = score(args, profile, paths, candidates, items, split)
    summary = {
        "split": split,
        "mode": args.mode,
        "exams": args.exams,
        "limit": args.limit,
        "test_looks": looks,
        "models": results,
    }
    file = validation_folder(paths) / f"{label(split, args.mode, args.exams, args.limit)}.json"
    records.write_json(file, summary)
    exams = list(next(iter(results.values()))["mcq"]["exams"])
    header = ["model", "right", "accuracy (95 % interval)", "majority", "", "unparsed", "against first", *exams]
    log.info("\n%s\n", cli.table(rows(results), header))
    part = f", {len(items)} drawn items" if args.limit else ""
    log.info("%s split, %s mode%s; written to %s", split, args.mode, part, show(file))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

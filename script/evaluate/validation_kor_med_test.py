"""KorMedMCQA accuracy of one or more models, on dev or, with --final, on test.

Reads   the models of a run, folders or hub ids, data/02_refined/02_kor_med_test/{dev,test}.jsonl, and what training
        reads (which items stand in it)
Writes  model/report/<name>/validation/<split>-<mode>[...].json and a .jsonl of every answer for each model
        model/report/<name>/test_looks.json, one entry for every time the test split was opened
        model/report/<name>/failed_questions.json (--failed-questions)

    python script/evaluate/validation_kor_med_test.py --model tiny
    python script/evaluate/validation_kor_med_test.py --model tiny --models base 02 --mode generate --exams doctor
    python script/evaluate/validation_kor_med_test.py --model tiny --rotations 5
    python script/evaluate/validation_kor_med_test.py --model medgemma-4b --models 02 --mode generate --reasoning \\
        --against model/report/medgemma-4b/validation/dev-generate-base.jsonl
    python script/evaluate/validation_kor_med_test.py --model tiny --failed-questions
    python script/evaluate/validation_kor_med_test.py --model medgemma-4b --models base 02 --final

Letter mode takes the option letter with the highest log-probability; generate mode lets the model answer and extracts
the letter, and what has none counts as wrong; harness mode is the official protocol through lm-evaluation-harness,
which is not installed with the project (pip install 'lm_eval>=0.4.13'). All models see the same items in the same
precision; the first one is what the others are compared with (exact McNemar), or the answers of --against. A file has
the scores of all models that were asked the same, also in several calls. Questions that are among the --shots are left
out: dev holds the official ones. Choose on dev: every look at test is counted.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medgemma_korean import batches, cli, contamination, evaluation, harness, mcq, precision, prompts, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile
from medgemma_korean.stage import changed_files, read_record, record_beside, vouch, vouched
from medgemma_korean.statistics import wilson
from medgemma_korean.ticker import Ticker

PROGRAM = "validation_kor_med_test"
ANSWERS = f"a .jsonl of {PROGRAM} or an evaluation.json"
SEED = 17
ANSWER_TOKENS = 64  # generate mode: a bare letter needs 2; an untrained model may add its option and a sentence
REASONING_TOKENS = 1024  # about twice the longest rationale that is trained


def chosen_items(
    items: Sequence[dict[str, Any]], exams: Sequence[str] | None, limit: int | None
) -> list[dict[str, Any]]:
    """Items of those exams, at most `limit` drawn by a fixed seed. Raises PipelineError for an unknown exam."""
    known = sorted({item["exam"] for item in items})
    if unknown := sorted(set(exams or ()) - set(known)):
        raise PipelineError(f"--exams {' '.join(unknown)}: the split has {', '.join(known)}")
    return batches.sample([item for item in items if not exams or item["exam"] in exams], limit, SEED)


def label(split: str, args: argparse.Namespace) -> str:
    """The files' name: a part of a split, or another way to ask, never overwrites the scores of the whole.

    Which models were asked for is not in it: one file has the scores of all of them (`with_earlier`).
    """
    parts = [split, args.mode, *(["reasoning"] if args.reasoning else []), *sorted(set(args.exams or ()))]
    parts += [f"{name}{number}" for name, number in (("shots", args.shots), ("limit", args.limit)) if number]
    parts += [f"rotations{args.rotations}"] if args.rotations > 1 else []
    parts += [f"tokens{args.max_new_tokens}"] if args.max_new_tokens else []
    parts += [args.precision] if args.precision != "auto" else []
    return "-".join(parts + (["checkpoints"] if args.failed_questions else []))


def count_look(paths: RunPaths, scores: Path, **what: Any) -> int:
    """Record a look at the test split before a score of it exists; returns how many there are by now.

    scores: what the look will write. Where it is not there, the last look was broken off, and the same one goes on.
    """
    file, looks = paths.report / "test_looks.json", evaluation.test_looks(paths)
    if looks and not vouched(scores) and {**looks[-1], "time": None} == {"time": None, **records.read_back(what)}:
        return len(looks)
    looks.append({"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **what})
    records.write_json(file, looks)
    vouch(PROGRAM, [file], 0.0)
    return len(looks)


# another file's answers ---------------------------------------------------------------------------------


def digest(item: Mapping[str, Any]) -> str:
    """What tells whether two files hold the same question in the same words."""
    return records.digest_of([item["question"], prompts.options(item), item["answer"]])[:16]


def earlier_answers(file: Path, items: Sequence[Mapping[str, Any]], asked: str) -> dict[str, Any]:
    """An evaluation to compare with, from the answers (.jsonl) or the evaluation.json of another run.

    Raises PipelineError where the file holds no answers, other items, or answers in another precision.
    """
    if not file.is_file():
        raise PipelineError(f"--against {file}: no such file; give {ANSWERS}")
    whole: dict[str, Any] = {"predictions": []}
    if file.suffix == ".json":
        read = records.read_json(file)
        whole = read if isinstance(read, dict) and isinstance(read.get("predictions"), list) else whole
    else:
        whole["predictions"] = list(records.read_jsonl(file))
    rows = whole["predictions"]
    if not rows or not all(isinstance(row, dict) and {"id", "gold", "predicted"} <= row.keys() for row in rows):
        raise PipelineError(f"--against {show(file)}: no answers there; give {ANSWERS}")
    rows = [{**row, "id": str(row["id"])} for row in rows]  # another program's file may have numbers
    theirs, ours = {row["id"]: row for row in rows}, {item["id"]: item for item in items}
    other = theirs.keys() ^ ours.keys()
    other |= {i for i in theirs.keys() & ours.keys() if theirs[i].get("item", digest(ours[i])) != digest(ours[i])}
    other |= {i for i in theirs.keys() & ours.keys() if theirs[i]["gold"] != ours[i]["answer"]}
    if other or len(theirs) != len(rows):
        raise PipelineError(
            f"--against {show(file)}: holds other items ({len(rows)} there, {len(items)} here, {len(other)} differ"
            + (f", such as {min(other)}" if other else "")
            + "); compare answers to the same split, --exams, --limit and --shots"
        )
    was = whole.get("precision", rows[0].get("precision", asked))
    if was != asked:
        raise PipelineError(f"--against {show(file)}: scored in {was}, and this call in {asked}; add --precision {was}")
    protocol = whole.get("protocol", rows[0].get("protocol"))
    correct = sum(row["predicted"] == row["gold"] for row in rows)
    return {"which": show(file), "protocol": protocol, "predictions": rows, "mcq": {"accuracy": correct / len(rows)}}


# what is shown ------------------------------------------------------------------------------------------


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a model: accuracy with interval, baseline, unparsed, McNemar against the first, then each exam."""
    result = []
    for name, found in results.items():
        score, change = found["mcq"], found.get("against_file", found.get("against_first"))
        refused = f" ({score['refused']} refused)" if score["refused"] else ""
        result.append(
            [
                name,
                f"{score['correct']}/{score['n']}",
                f"{score['accuracy']:.1%} ({score['lower']:.1%} to {score['upper']:.1%})",
                f"{score['majority_accuracy']:.1%} ({score['majority_letter']})",
                "within chance" if mcq.within_chance(score) else "above chance",
                f"{score['unparsed']}{refused}",
                f"{change['accuracy_change']:+.1%}, p {change['p']:.2g}" if change else "",
                *(f"{exam['accuracy']:.1%}" for exam in score["exams"].values()),
            ]
        )
    return result


def details(found: dict[str, Any]) -> list[str]:
    """Lines below the table's row: letters, what has no letter, rotations, reasoning, clean items."""
    score = found["mcq"]
    letters = " ".join(f"{k} {score['predicted'][k]}/{score['gold'].get(k, 0)}" for k in score["predicted"])
    alarm = f"; more than {mcq.ALARM_SHARE:.0%} of the answers are {score['alarm']}" if score["alarm"] else ""
    lines = [f"predicted/gold {letters}{alarm}"]
    if score["unparsed"]:
        why = ", ".join(f"{number} {reason}" for reason, number in score["unparsed_reasons"].items())
        parsed = "none" if score["accuracy_parsed"] is None else f"{score['accuracy_parsed']:.1%}"
        lines.append(f"without a letter, counted as wrong: {why}; right among the others: {parsed}")
    if turned := found.get("rotations"):
        lines.append(
            f"{turned['n']} rotations: mean {turned['mean_accuracy']:.1%}, vote {turned['vote_accuracy']:.1%} "
            f"({turned['vote_lower']:.1%} to {turned['vote_upper']:.1%}), the same option in all "
            f"{turned['consistency']:.1%}"
        )
    if reasoned := found.get("reasoning"):
        lines.append(f"reasoning: format {reasoned['format']:.2f}, with the answer {reasoned['combined']:.2f}")
    if found.get("cut_off"):
        lines.append(f"{cli.count(found['cut_off'], 'answer')} cut off at --max-new-tokens {found['max_new_tokens']}")
    if left := found.get("harness", {}).get("left_out"):
        lines.append(f"{cli.count(left, 'question')} left out: among the shots, so solved in the prompt")
    if limit := found.get("limit"):
        lines.append(
            f"{limit['n']} of {limit['of']} items: the interval is ±{100 * limit['half_width']:.1f} points, "
            f"all items would give ±{100 * limit['half_width_of_all']:.1f}"
        )
    parts = found["contamination"]
    if parts["touched"]:
        shares = ", ".join(
            f"{name} {part['accuracy']:.1%} of {part['n']}" for name, part in parts.items() if part is not None
        )
        lines.append(f"items that stand in the training text apart: {shares}")
    return lines


# scoring ------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True, force=False)
    parser.add_argument(
        "--models", nargs="+", metavar="M",
        help="base extended 00 01 merged 02 loop, folders, or hub ids (default: all there are)",
    )  # fmt: skip
    parser.add_argument("--final", action="store_true", help="open the test split; the look is counted")
    parser.add_argument("--mode", choices=("letter", "generate", "harness"), default="letter")
    parser.add_argument("--exams", nargs="+", metavar="E", help="only these exams: doctor nurse pharm dentist")
    parser.add_argument("--limit", type=cli.positive_int, metavar="N", help="only N items, drawn by a fixed seed")
    parser.add_argument(
        "--rotations", type=int, choices=range(1, 6), default=1, metavar="N",
        help="ask every item N times, its options rotated (1 to 5; four options have 4; default: 1)",
    )  # fmt: skip
    parser.add_argument("--reasoning", action="store_true", help="generate mode: ask for reasoning first")
    parser.add_argument(
        "--max-new-tokens", type=cli.positive_int, metavar="N",
        help=f"longest answer in generate mode (default: {ANSWER_TOKENS}; with --reasoning {REASONING_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--shots", type=cli.positive_int, default=0, metavar="N", help="harness mode: official shots (default: none)"
    )
    parser.add_argument("--against", metavar="FILE", help="compare with a file of answers instead of the first model")
    parser.add_argument(
        "--failed-questions", action="store_true",
        help="score the kept checkpoints of one training (default: the last) and list what fails most often; dev only",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("auto", "8bit", "nf4", "bf16", "fp32"), default="auto")
    return parser


def require_options(args: argparse.Namespace) -> None:
    """Raise PipelineError for options that do not go together, and for a harness that is not there."""
    models = list(dict.fromkeys(args.models or ()))
    wrong = [
        ("--reasoning goes with --mode generate", args.reasoning and args.mode != "generate"),
        ("--max-new-tokens goes with --mode generate", args.max_new_tokens and args.mode != "generate"),
        ("--shots goes with --mode harness", args.shots and args.mode != "harness"),
        ("--rotations goes with --mode letter or generate", args.rotations > 1 and args.mode == "harness"),
        ("--failed-questions looks at dev alone; leave out --final", args.failed_questions and args.final),
        (
            f"--failed-questions counts over the checkpoints of one training; give one of --models {' '.join(models)}",
            args.failed_questions and len(models) > 1,
        ),
    ]
    if problems := [text for text, is_wrong in wrong if is_wrong]:
        raise PipelineError("; ".join(problems))
    if args.mode == "harness":
        harness.require()
        harness.require_task()


class Official(NamedTuple):
    """What harness mode scores: the folder of its task files, the tasks' names, and how many items were shots."""

    folder: Path
    tasks: list[str]
    left_out: int


def answers(
    model: Any,
    tokenizer: Any,
    items: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    profile: ModelProfile,
    tick: Ticker,
    official: Official | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of all items in the mode of the call, and what the mode adds to the result."""
    if official is not None:
        found, told = harness.score(
            model, tokenizer, official.folder, official.tasks, items, shots=args.shots, batch=profile.score_batch
        )
        return found, {"harness": told | ({"left_out": official.left_out} if args.shots else {})}
    if args.mode == "letter":
        answer = functools.partial(evaluation.score_letters, model, tokenizer, batch=profile.score_batch, tick=tick)
    else:
        most = args.max_new_tokens or (REASONING_TOKENS if args.reasoning else ANSWER_TOKENS)
        answer = functools.partial(
            evaluation.generate_letters, model, tokenizer,
            batch=profile.score_batch, most=most, tick=tick, reasoning=args.reasoning,
        )  # fmt: skip
    more: dict[str, Any] = {}
    if args.rotations > 1:
        found, more["rotations"] = evaluation.rotate(answer, items, args.rotations)
    else:
        found = answer(items)
    if args.mode == "generate":
        more |= {"max_new_tokens": most, "cut_off": sum(not row["ended"] for row in found)}
    if args.reasoning:
        more["reasoning"] = {name: sum(row[name] for row in found) / len(found) for name in ("format", "combined")}
    return found, more


def interval_of_limit(score: Mapping[str, Any], of: int) -> dict[str, Any]:
    """What scoring a part costs: half of the interval's width in accuracy, and what all items would have."""
    lower, upper = wilson(round(score["accuracy"] * of), of)
    half = (score["upper"] - score["lower"]) / 2
    return {"n": score["n"], "of": of, "half_width": half, "half_width_of_all": (upper - lower) / 2}


def score(
    args: argparse.Namespace,
    profile: ModelProfile,
    paths: RunPaths,
    candidates: list[evaluation.Candidate],
    items: list[dict[str, Any]],
    of: int,
    split: str,
    asked: str,
    first: dict[str, Any] | None,
    touched: Sequence[str],
    official: Official | None,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Score every model of the call and write its answers; returns the results with them.

    of: how many items there are without --limit. first: what --against gave. touched: items in the training text.
    official: the tasks of harness mode.
    """
    from medgemma_korean import modeling

    modeling.set_up_torch(SEED)
    name, given = label(split, args), first is not None
    results = {}
    for candidate, model, tokenizer in evaluation.loaded(candidates, profile, device, asked):
        with Ticker(candidate.name) as tick:
            predictions, more = answers(model, tokenizer, items, args, profile, tick, official)
        del model  # room for the next
        assert [row["id"] for row in predictions] == [item["id"] for item in items], "items were lost"
        result = {
            "which": candidate.name,
            "model": show(candidate.adapter or candidate.base),
            "weights": candidate.weights(),
            "precision": asked,
            "protocol": "-".join([args.mode, *(["reasoning"] if args.reasoning else [])]),
            "split": split,
            "items": evaluation.items_digest(items),
            "mcq": mcq.score(predictions),
            **more,
            "contamination": contamination.accuracies(predictions, touched),
        }
        if args.limit:
            result["limit"] = interval_of_limit(result["mcq"], of)
        kept = {key: result[key] for key in ("precision", "protocol")}
        predictions = [{**row, "item": digest(item), **kept} for row, item in zip(predictions, items, strict=True)]
        whole = {**result, "predictions": predictions}
        if first is None:
            first = whole
        elif given:
            result["against_file"] = evaluation.compare_rows(first, whole) | {"protocol": first["protocol"]}
        else:
            result["against_first"] = evaluation.compare(first, whole)
        records.write_jsonl(validation_folder(paths) / f"{name}-{candidate.name}.jsonl", predictions)
        for line in details(result):
            log.info("%s: %s", candidate.name, line)
        results[candidate.name] = {**result, "predictions": predictions}
    return results


def with_earlier(file: Path, new: dict[str, dict[str, Any]], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of this call, and those of other models that an earlier one left in the summary `file`.

    Kept is what has the same items and precision, its answers still as they were written; and a McNemar test while
    both of its models have the scores that it compared. known: the contamination of the split as it is now.
    """
    try:
        written = (read_record(record_beside(file)) or {}).get("outputs", {})
    except PipelineError:  # a damaged record vouches for nothing
        written = {}

    def whole(name: str) -> bool:
        return name in written and not changed_files({name: written[name]}, file.parent)

    if not whole(file.name):
        if file.is_file():
            log.warning("%s is not as it was written; what it holds of other models is dropped", show(file))
        return new
    earlier, first = records.read_json(file), next(iter(new.values()))
    was = earlier["models"]
    same = {name for name, old in was.items() if all(old.get(key) == first[key] for key in ("items", "precision"))}
    kept = {name for name in same - new.keys() if whole(f"{file.stem}-{name}.jsonl")}
    merged = {name: new[name] if name in new else was[name] for name in [*was, *new] if name in kept | new.keys()}

    def holds(name: str) -> bool:
        return name in same & merged.keys() and all(was[name].get(k) == merged[name].get(k) for k in ("weights", "mcq"))

    for name in same & merged.keys():
        change = was[name].get("against_first")
        if change and holds(name) and holds(change["before"]):
            if "against_file" not in merged[name]:
                merged[name].setdefault("against_first", change)
        elif name in kept:
            merged[name].pop("against_first", None)
    if any(earlier.get("contamination", {}).get(key) != known[key] for key in contamination.PARTS):
        for name in kept:
            merged[name].pop("contamination", None)  # other items are clean and touched now
    for names, what in (
        (kept, "stay in it"),
        (was.keys() - merged.keys(), "do not: other items, precision, or answers"),
    ):
        if names:
            log.info("%s: earlier scores of %s %s", show(file), ", ".join(name for name in was if name in names), what)
    return merged


def validation_folder(paths: RunPaths) -> Path:
    return paths.report / "validation"


def write_failed(
    paths: RunPaths,
    results: dict[str, dict[str, Any]],
    found: dict[str, tuple[evaluation.Candidate, int]],
    items: Sequence[Mapping[str, Any]],
) -> None:
    """`failed_questions.json`: the looks, and the ten questions that fail most often over them."""
    looks = [(step, mcq.wrong(results[name]["predictions"])) for name, (_, step) in found.items()]
    failed = mcq.failed_questions(looks, items)
    about = [
        {"step": step, "adapter": show(candidate.adapter), "accuracy": results[name]["mcq"]["accuracy"]}
        for name, (candidate, step) in found.items()
    ]
    file = paths.report / "failed_questions.json"
    records.write_json(file, {"split": "dev", "items": len(items), "looks": about, "questions": failed})
    vouch(PROGRAM, [file], 0.0)
    lines = [
        [entry["question_id"], f"{entry['fail_count']} of {len(looks)}", entry["expected"],
         entry["last_predicted"] or "none", str(entry["last_failed_step"]), entry["question_preview"][:40]]
        for entry in failed
    ]  # fmt: skip
    header = ["question", "failed", "expected", "said", "at step", "text"]
    log.info("\n%s\n\nwritten to %s", cli.table(lines, header), show(file))


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    begun = time.monotonic()
    cli.start_logging(paths, PROGRAM)
    require_options(args)
    evaluation.require_held_out(paths)
    # What a person can give wrongly is found before the look, so that a slip costs none.
    training = args.models[0] if args.models else None
    checkpoints = evaluation.checkpoints_of(paths, training) if args.failed_questions else {}
    candidates = [found for found, _ in checkpoints.values()] or evaluation.candidates(paths, args.models)
    split = "test" if args.final else "dev"
    whole = mcq.read_items(paths.mcq / f"{split}.jsonl", also=("id", "exam"))
    wanted = chosen_items(whole, args.exams, None)
    fewshot = harness.shots_of(paths) if args.shots else []
    scored = harness.without_shots(wanted, fewshot, args.shots)
    items = chosen_items(scored, None, args.limit)
    if not items:
        raise PipelineError(f"{show(paths.mcq / f'{split}.jsonl')}: no questions; nothing could be scored")
    asked = precision.of_run(args.precision, paths, profile)
    first = earlier_answers(Path(args.against).expanduser(), items, asked) if args.against else None
    known = contamination.ledger(paths, split, whole, built=profile.tiny is not None)
    official = None
    if args.mode == "harness":
        folder = validation_folder(paths) / f"{label(split, args)}-tasks"
        tasks = harness.write_tasks(folder, items, fewshot, args.shots)
        official = Official(folder, tasks, len(wanted) - len(scored))

    from medgemma_korean import modeling

    device = modeling.pick_device(args.device)
    looks = None
    file = validation_folder(paths) / f"{label(split, args)}.json"
    if args.final:
        weights = {candidate.name: candidate.weights() for candidate in candidates}
        how = {"mode": args.mode, "exams": args.exams, "limit": args.limit, "file": file.name}
        looks = count_look(paths, file, program=PROGRAM, models=weights, **how)
        log.warning("look %d at the test split of run %s", looks, paths.name)

    given = (split, asked, first, known["touched"], official, device)
    results = score(args, profile, paths, candidates, items, len(scored), *given)
    summary = {
        "split": split,
        "mode": args.mode,
        "exams": args.exams,
        "limit": args.limit,
        "test_looks": looks,
        "contamination": {key: known[key] for key in contamination.PARTS},
        "models": {name: {k: v for k, v in found.items() if k != "predictions"} for name, found in results.items()},
    }
    if not args.failed_questions:  # those are of one training, and of one call
        summary["models"] = with_earlier(file, summary["models"], known)
    records.write_json(file, summary)
    answers = [file.with_name(f"{file.stem}-{name}.jsonl") for name in summary["models"]]
    vouch(PROGRAM, [file, *answers], time.monotonic() - begun)
    if args.failed_questions:
        write_failed(paths, results, checkpoints, items)
    exams = list(next(iter(results.values()))["mcq"]["exams"])
    against = "against the file" if first else "against first"
    header = ["model", "right", "accuracy (95 % interval)", "majority", "", "unparsed", against, *exams]
    log.info("\n%s\n", cli.table(rows(results), header))
    part = f", {len(items)} drawn items" if args.limit else ""
    log.info("%s split, %s mode%s; written to %s", split, args.mode, part, show(file))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

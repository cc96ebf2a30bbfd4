"""Normalise the exam questions, keep the splits apart, add rationales, and list the symbols that occur.

Reads   data/01_raw/02_kor_med_test/, data/01_raw/by_source/medical_reasoning_kormedmcqa/ (where it was fetched),
        data/02_refined/01_medical_dict.json (its symbols, where there is one)
Writes  data/02_refined/02_kor_med_test/{train,dev,test}.jsonl, train_with_reasoning.jsonl where rationales exist,
        data/02_refined/02_char_dict.json : [{"term", "definition", "count"}]

    python script/refine/refine_02_kor_med_test.py --model tiny
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import Any

from medgemma_korean import cli, mcq, prompts, rationales, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary import count_symbols
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import Input, Stage

FORMAT = 3
SPLITS = ("train", "dev", "test")
RATIONALES = BY_KEY["medical_reasoning_kormedmcqa"]
# Characters: 600 to 750 tokens at a guess, which leaves question and options 270 or more of the 1,024 tokens of a row.
# What is longer would cost the row its question's beginning, or be lost.
LONGEST = 1200


def read_split(paths: RunPaths, split: str, unusable: list[str] | None) -> list[dict]:
    """The normalised items of a split, in order. Raises PipelineError with file and row.

    A row of train that stands there twice is left for `without_leaks`; two questions under one key are an error, and
    so is any key that an evaluation split has twice.
    """
    from medgemma_korean.text.clean import normalise_line

    file = paths.raw_mcq / f"{split}.jsonl"
    items = mcq.read_raw_items(file, normalise_line, unusable)
    # As a set of contents where equal rows are allowed.
    contents = {(item["id"], *map(item.get, ("question", *"ABCDE", "answer"))): item["id"] for item in items}
    ids = Counter(contents.values() if split == "train" else [item["id"] for item in items])
    if doubled := [i for i, n in ids.items() if n > 1]:
        raise PipelineError(
            f"{show(file)}: {cli.count(len(doubled), 'key')} (exam, year, period, number) twice, first {doubled[0]}; "
            "number them anew, or take one of each away"
        )
    if not items:
        raise PipelineError(f"{show(file)}: no questions; bring the split anew")
    return items


def without_leaks(train: list[dict], held_out: dict[str, list[dict]], counts: Counter[str]) -> list[dict]:
    """Train items that stand in no other split and only once; the evaluation splits are never changed.

    Copies with different answers all go: nothing in the data tells which of them is right.
    """
    from medgemma_korean.text.decontaminate import ExamIndex, fold

    indexes = {split: ExamIndex(items) for split, items in held_out.items()}
    answers: dict[Any, set] = defaultdict(set)
    for item in train:
        answers[mcq.item_key(item)].add(fold(item[item["answer"]]))
    kept: list[dict] = []
    seen, leaks = set(), []
    for item in train:
        printed, key = f"{item['question']}\n{prompts.options(item)}", mcq.item_key(item)
        where = next((s for s, index in indexes.items() if index.same_item(item) or index.touched_by(printed)), None)
        if where:
            counts[f"stands in {where}"] += 1
            leaks.append(item["id"])
        elif len(answers[key]) > 1:
            counts["duplicate with another answer"] += 1
        elif key in seen:
            counts["exact_duplicate"] += 1
        else:
            seen.add(key)
            kept.append(item)
    if leaks:
        log.info("left out of training, held out elsewhere: %s%s", ", ".join(leaks[:5]), ", …" if leaks[5:] else "")
    return kept


def repeated(splits: dict[str, list[dict]]) -> dict[str, int]:
    """How many items of dev and test repeat an earlier one, within a split and across; they are only reported."""
    keys = {split: [mcq.item_key(item) for item in splits[split]] for split in ("dev", "test")}
    found = {split: len(of) - len(set(of)) for split, of in keys.items()}
    found["dev and test"] = len(set(keys["dev"]) & set(keys["test"]))
    return {where: number for where, number in found.items() if number}


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--longest-rationale",
        type=cli.positive_int,
        default=LONGEST,
        metavar="N",
        help=f"characters of a rationale at most; more needs a larger --max-length in training (default: {LONGEST:,})",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "refine_02_kor_med_test")
    published = paths.raw / RATIONALES.folder
    stage = Stage(
        "refine_02_kor_med_test",
        paths,
        outputs=[paths.mcq, paths.characters],
        inputs=[
            Input("exam questions", paths.raw_mcq, repair=paths.command("download/download_02_kor_med_test")),
            Input("rationales", published, optional=True),
            Input("dictionary", paths.dictionary, record=paths.record("refine_01_medical_dict"), optional=True),
        ],
        settings={"longest_rationale": args.longest_rationale},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    if lacking := [f"{split}.jsonl" for split in SPLITS if not (paths.raw_mcq / f"{split}.jsonl").is_file()]:
        check = paths.command("download/download_02_kor_med_test")
        raise PipelineError(f"{show(paths.raw_mcq)} lacks {', '.join(lacking)}; bring it, and check with: {check}")
    with stage.work() as folder:
        unusable: list[str] = []
        splits = {split: read_split(paths, split, unusable if split == "train" else None) for split in SPLITS}
        few = read_split(paths, "fewshot", None) if (paths.raw_mcq / "fewshot.jsonl").is_file() else []
        counts: Counter[str] = Counter(read=len(splits["train"]) + len(unusable))
        if unusable:
            counts["unusable"] = len(unusable)
            log.warning("left out of training: %s", "; ".join(unusable[:3]))
        held_out = {"dev or test": splits["dev"] + splits["test"], "fewshot": few}
        splits["train"] = without_leaks(splits["train"], held_out, counts)
        counts["kept"] = len(splits["train"])
        if not splits["train"]:
            raise PipelineError(
                f"{show(paths.raw_mcq)}: no train question is left ({cli.listed(counts)}); bring others"
            )
        judge = rationales.Judge(splits["train"], [*held_out["dev or test"], *few], args.longest_rationale)
        worked = judge.own() + judge.add(published, RATIONALES)
        if 2 * (useless := judge.useless(worked)) > worked["read"]:
            stage.warnings.append(f"{show(published)}: {useless:,} of {worked['read']:,} rationales are unusable")
        for split, items in splits.items():
            records.write_jsonl(folder / paths.mcq.name / f"{split}.jsonl", items)
        reasoned = [item for item in splits["train"] if item.get("reasoning")]
        if reasoned:
            records.write_jsonl(folder / paths.mcq.name / "train_with_reasoning.jsonl", reasoned)
        dictionary = records.read_json(paths.dictionary) if stage.identity()["inputs"]["dictionary"] else []
        # Symbols of training text only: evaluation text never feeds a dictionary.
        texts = [f"{i['question']} {prompts.options(i)} {i.get('reasoning', '')}" for i in splits["train"]]
        symbols, unknown = count_symbols(texts + [f"{row['term']} {row['definition']}" for row in dictionary])
        records.write_json(folder / paths.characters.name, symbols)
        twice = repeated(splits)
        rows = [[f"train: {k}", n] for k, n in counts.items()]
        rows += [["dev", len(splits["dev"])], ["test", len(splits["test"])], ["fewshot, never trained on", len(few)]]
        rows += [[f"repeated within {where}, kept", n] for where, n in twice.items()]
        rows += [[f"rationales, {k}", n] for k, n in worked.items()]
        rows += [["rationales", len(reasoned)], ["symbols explained", len(symbols)]]
        log.info("%s", cli.table(rows, ["exam questions", "number"]))
        for warning in stage.warnings:
            log.warning("%s", warning)
        if not reasoned:
            log.info("rationales: 0, detailed form: 0 %")
        if unknown:
            log.info("symbols without a meaning: %s", " ".join(f"{c} ({n})" for c, n in unknown.most_common(20)))
        stage.complete(
            counts={
                "train": dict(counts),
                **{s: len(splits[s]) for s in ("dev", "test")},
                "fewshot": len(few),
                "repeated": twice,
                "rationales": len(reasoned),
                "rationale_rows": dict(worked),
                "symbols": len(symbols),
                "unknown_symbols": dict(unknown.most_common(50)),
            },
            metric=f"{counts['kept']:,} train, {len(splits['dev']):,} dev, {len(splits['test']):,} test questions",
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

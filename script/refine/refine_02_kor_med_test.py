"""Normalise the exam questions, keep the splits apart, and list the symbols that occur with their meaning.

Reads   data/01_raw/02_kor_med_test/, data/02_refined/01_medical_dict.json (its symbols, where there is one)
Writes  data/02_refined/02_kor_med_test/{train,dev,test}.jsonl, train_with_reasoning.jsonl where rationales exist,
        data/02_refined/02_char_dict.json

    python script/refine/refine_02_kor_med_test.py --model tiny
"""

from __future__ import annotations

import sys
from collections import Counter

from medgemma_korean import cli, mcq, prompts, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary import count_symbols
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.stage import Input, Stage

FORMAT = 1
SPLITS = ("train", "dev", "test")


def read_split(paths: RunPaths, split: str, unusable: list[str] | None) -> list[dict]:
    """The normalised items of a split, in order. Raises PipelineError with file and row."""
    from medgemma_korean.text.clean import normalise_line

    file = paths.raw_mcq / f"{split}.jsonl"
    items = mcq.read_raw_items(file, normalise_line, unusable)
    ids = Counter(item["id"] for item in items)
    if doubled := [i for i, n in ids.items() if n > 1]:
        raise PipelineError(f"{show(file)}: {len(doubled)} keys (exam, year, period, number) twice, first {doubled[0]}")
    if not items:
        raise PipelineError(f"{show(file)}: no questions")
    return items


def without_leaks(train: list[dict], held_out: list[dict], counts: Counter[str]) -> list[dict]:
    """Train items that stand in no other split and only once; the evaluation splits are never changed."""
    from medgemma_korean.text.decontaminate import ExamIndex

    index = ExamIndex(held_out)
    kept: list[dict] = []
    seen = set()
    for item in train:
        same = item_key(item)
        if index.same_item(item) or index.touched_by(f"{item['question']}\n{prompts.options(item)}"):
            counts["stands in dev or test"] += 1
        elif same in seen:
            counts["exact_duplicate"] += 1
        else:
            seen.add(same)
            kept.append(item)
    return kept


def item_key(item: dict) -> tuple[str, frozenset[str]]:
    """Folded question and folded set of options: equal for the same question in another order or spacing."""
    from medgemma_korean.text.decontaminate import fold

    return fold(item["question"]), frozenset(fold(item[letter]) for letter in prompts.letters_of(item))


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "refine_02_kor_med_test")
    stage = Stage(
        "refine_02_kor_med_test",
        paths,
        outputs=[paths.mcq, paths.characters],
        inputs=[
            Input("exam questions", paths.raw_mcq, repair=paths.command("download/download_02_kor_med_test")),
            Input("dictionary", paths.dictionary, record=paths.record("refine_01_medical_dict"), optional=True),
        ],
        settings={},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work() as folder:
        unusable: list[str] = []
        splits = {split: read_split(paths, split, unusable if split == "train" else None) for split in SPLITS}
        counts: Counter[str] = Counter(read=len(splits["train"]) + len(unusable))
        if unusable:
            counts["unusable"] = len(unusable)
            log.warning("left out of training: %s", "; ".join(unusable[:3]))
        splits["train"] = without_leaks(splits["train"], splits["dev"] + splits["test"], counts)
        counts["kept"] = len(splits["train"])
        if not splits["train"]:
            raise PipelineError(f"{show(paths.raw_mcq)}: no train question is left; {dict(counts)}")
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
        rows = [[f"train: {k}", n] for k, n in counts.items()]
        rows += [["dev", len(splits["dev"])], ["test", len(splits["test"])], ["rationales", len(reasoned)]]
        rows += [["symbols explained", len(symbols)]]
        log.info("%s", cli.table(rows, ["exam questions", "number"]))
        if not reasoned:
            log.info("rationales: 0, detailed form: 0 %")
        if unknown:
            log.info("symbols without a meaning: %s", " ".join(f"{c} ({n})" for c, n in unknown.most_common(20)))
        stage.complete(
            counts={
                "train": dict(counts),
                **{s: len(splits[s]) for s in ("dev", "test")},
                "rationales": len(reasoned),
                "symbols": len(symbols),
                "unknown_symbols": dict(unknown.most_common(50)),
            },
            metric=f"{counts['kept']:,} train, {len(splits['dev']):,} dev, {len(splits['test']):,} test questions",
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

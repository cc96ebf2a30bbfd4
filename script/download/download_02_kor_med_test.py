"""Get the KorMedMCQA exam questions of four exams, or check what is already there.

Reads   hub: sean0042/KorMedMCQA (CC BY-NC 2.0)
Writes  data/01_raw/02_kor_med_test/{train,dev,test,fewshot}.jsonl (fewshot is optional for readers)

    python script/download/download_02_kor_med_test.py --model medgemma-4b
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from medgemma_korean import cli, mcq, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import Input, Stage
from medgemma_korean.text.clean import normalise_line

FORMAT = 1
SPLITS = ("train", "dev", "test")
EXAMS = ("doctor", "nurse", "pharm", "dentist")
# Rows by split over the four exams at the published revision; another number means another data set.
EXPECTED = {"train": 3401, "dev": 1059, "test": 3009, "fewshot": 20}


def convert(folder: Path, target: Path) -> dict[str, int]:
    """The hub's Parquet files, one config a folder, as one JSONL a split. Raises PipelineError on other sizes."""
    rows: dict[str, list[dict]] = {split: [] for split in EXPECTED}
    for exam in EXAMS:
        for split in EXPECTED:
            files = sorted({*folder.glob(f"{exam}/{split}-*.parquet"), *folder.glob(f"data/{exam}/{split}-*.parquet")})
            for file in files:
                rows[split] += [{**row, "exam_type": exam} for row in records.read_parquet(file)]
    sizes = {split: len(found) for split, found in rows.items()}
    if sizes != EXPECTED:
        raise PipelineError(f"KorMedMCQA has {sizes} rows, expected {EXPECTED}; the data set has changed")
    for split, found in rows.items():
        keys = Counter((r["exam_type"], r["year"], r["period"], r["q_number"]) for r in found)
        if doubled := [key for key, n in keys.items() if n > 1]:
            raise PipelineError(f"KorMedMCQA {split}: {len(doubled)} keys twice, first {doubled[0]}")
        records.write_jsonl(target / f"{split}.jsonl", found)
    return sizes


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser(__doc__).parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_02_kor_med_test")
    folder = paths.raw_mcq
    origins = {}
    if not folder.exists():
        from medgemma_korean import hub

        source = BY_KEY["kor_med_test"]
        raw = folder.with_name(".02_kor_med_test.parquet")
        again = paths.command("download/download_02_kor_med_test")
        if not raw.exists():
            origins[source.key] = hub.fetch(source, raw, repo_type="dataset", what=again)
        part = folder.with_name(".02_kor_med_test.partial")
        convert(raw, part)
        part.rename(folder)
    missing = [show(folder / f"{split}.jsonl") for split in SPLITS if not (folder / f"{split}.jsonl").is_file()]
    if missing:
        raise PipelineError(f"missing: {', '.join(missing)}")
    stage = Stage(
        "download_02_kor_med_test",
        paths,
        outputs=[folder],
        inputs=[Input("exam questions", folder)],
        settings={},
        format=FORMAT,
        force=args.force,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        counts = {}
        for file in records.row_files(folder):
            unusable = [] if file.stem == "train" else None
            rows = mcq.read_raw_items(file, normalise_line, unusable)
            if not rows:
                raise PipelineError(f"{show(file)}: no usable questions")
            if unusable:
                log.warning("%s will be left out, first: %s", cli.count(len(unusable), "question"), unusable[0])
            counts[file.stem] = len(rows)
            log.info("%s: %s", show(file), cli.count(len(rows), "question"))
        stage.complete(counts=counts, origins=origins)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

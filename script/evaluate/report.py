"""Write the report of a run, or the comparison of two, and print its final table.

Reads   every evaluation and stage record of the run, its progress, what refining counted, the text that training reads;
        once stage 02 is complete its model and the base, to score them on the test split
Writes  model/report/<name>/index.html (one file, nothing else is needed to read it), its figures as PNG, summary.json
        model/report/<name>/validation/test-letter.json and test_looks.json, where the test split was opened
        with --compare: model/report/<B>/compare_<A>.html, .png, .json

    python script/evaluate/report.py --model tiny
    python script/evaluate/report.py --model tiny --beside tiny-base     # stage 00 of two runs on the same text
    python script/evaluate/report.py --model tiny --compare tiny other   # two runs, stage by stage

The test split is opened once for what stage 02 made, and the look is counted; a report made again reads the scores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from medgemma_korean import cli, page, progress, records, report
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.stage import RECORD_NAME, read_record


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, device=True)
    parser.add_argument("--no-test", action="store_true", help="leave the test split closed")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--beside", nargs="+", default=[], metavar="RUN", help="show stage 00 of these runs beside that of this one"
    )
    which.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="compare two runs: changes, McNemar's test, intervals"
    )
    return parser


def named(paths: RunPaths, option: str, names: list[str]) -> list[RunPaths]:
    """Other runs of the project; a name may end in the slash of a completed folder. Raises PipelineError."""
    return [dataclasses.replace(paths, name=cli.require_name(option, name.removesuffix("/"))) for name in names]


def compare(runs: list[RunPaths]) -> int:
    """The page and the table of two runs."""
    names = [run.name for run in runs]
    file = runs[1].report / f"compare_{names[0]}.html"
    cited = file.with_suffix(".json")
    made = page.compare_page(runs, cited.name)
    cli.start_logging(runs[1], "report")
    if not page.write(made, file, cited):
        log.info("report: already complete (%s)", show(file))
    log.info("\nA %s, B %s\n%s\n", *names, cli.table(report.compared_rows(made.summary), report.COMPARED))
    for name, entry in made.summary["stages"].items():
        if entry["not_paired"]:
            log.info("note: %s: %s", name, entry["not_paired"])
        for reason in entry["change"]["not_compared"]:
            log.info("note: %s: %s", name, reason)
    log.info("report: %s", show(file))
    return 0


def open_test(args: argparse.Namespace, paths: RunPaths) -> bool:
    """Score the base and the model of stage 02 on the test split; False where that was done with these models.

    Raises PipelineError as `validation_kor_med_test` does.
    """
    record, test = read_record(paths.trained_02 / RECORD_NAME), paths.mcq / "test.jsonl"
    if args.no_test or record is None or not test.is_file() or next(records.read_jsonl(test), None) is None:
        return False
    plain = "base_files" in record  # trained on a base of the user's own, and not on the run's
    models = [str((paths.trained_02 / record["base_folder"]).resolve()) if plain else "base", "02"]
    if report.test_scores_stand(paths, models):
        return False
    import validation_kor_med_test  # beside this file

    run = [argument for argument in cli.shared_argv(args) if argument != "--force"]
    try:
        validation_kor_med_test.main([*run, "--final", "--models", *models])
    except PipelineError as error:
        raise PipelineError(f"{error}\nfor the report without the test split: --no-test") from None
    cli.start_logging(paths, "report")
    return True


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.compare:
        return compare(named(paths, "--compare", args.compare))
    others = named(paths, "--beside", args.beside)
    cli.start_logging(paths, "report")
    if not report.evaluations(paths):
        raise PipelineError(
            f"{show(paths.report)}: nothing was scored yet; run: ./run_full_pipeline.sh --model {args.model}"
        )
    made = page.run_page(paths, profile, others)  # what is wrong with the run is found before the look
    if open_test(args, paths):
        made = page.run_page(paths, profile, others)
    file = paths.report / "index.html"
    if not page.write(made, file, paths.report / "summary.json"):
        log.info("report: already complete (%s)", show(file))
    log.info("\n%s\n", report.final_table(paths))
    if others:
        log.info("%s\n", cli.table(made.summary["beside"], report.BESIDE))
    for line in made.summary["gates"]:
        log.info("gate %s", line)
    for line in made.summary["warnings"]:
        log.warning("note: %s", line)
    log.info("report: %s", show(file))
    progress.update(paths, "report", "report", state="complete", metric=show(file))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

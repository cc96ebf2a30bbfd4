"""Write the report of a run and print its final table.

Reads   every evaluation and stage record of the run
Writes  model/report/<name>/index.html, summary.json

    python script/evaluate/report.py --model tiny
    python script/evaluate/report.py --model tiny --beside tiny-base     # stage 00 of two runs on the same text
"""

from __future__ import annotations

import dataclasses
import sys

from medgemma_korean import cli, progress, records, report
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show


def main(argv: list[str] | None = None) -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="RUN", help="show stage 00 of these runs beside that of this one"
    )
    args = parser.parse_args(argv)
    profile, paths = cli.resolve(args)
    others = [dataclasses.replace(paths, name=name) for name in args.beside]
    cli.start_logging(paths, "report")
    found = report.evaluations(paths)
    if not found:
        raise PipelineError(
            f"{show(paths.report)}: nothing was scored yet; run: ./run_full_pipeline.sh --model {args.model}"
        )
    summary = {
        "name": paths.name,
        "model": profile.name,
        "evaluations": {
            name: {key: value for key, value in evaluation.items() if key not in ("predictions", "samples")}
            for name, evaluation in found.items()
        },
        "trained_parameters": report.trained_parameters(paths),
        "gates": report.gates(paths),
        "warnings": report.warnings(paths),
        "extension": report.extension(paths),
        "beside": report.beside([paths, *others]) if others else [],
    }
    page = paths.report / "index.html"
    written, text = paths.report / "summary.json", report.html_page(paths, profile, others)
    same = page.is_file() and page.read_text(encoding="utf-8") == text
    if same and written.is_file() and records.read_json(written) == records.read_back(summary):
        log.info("report: already complete (%s)", show(page))
    else:
        records.write_json(written, summary)
        records.write_text(page, text)
    log.info("\n%s\n", report.final_table(paths))
    if others:
        log.info("%s\n", cli.table(summary["beside"], report.BESIDE))
    for line in summary["gates"]:
        log.info("gate %s", line)
    for line in summary["warnings"]:
        log.warning("note: %s", line)
    log.info("report: %s", show(page))
    progress.update(paths, "report", "report", state="complete", metric=show(page))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Check everything that a run has finished, byte by byte: `./run_full_pipeline.sh --verify`.

Reads   every stage record of the run, the files that it describes, and the raw data
Writes  nothing

    python script/operate/verify.py --model medgemma-4b

For every record: its outputs have the recorded sha256, its fingerprint is that of its identity, and what it read
is still what the stages before it (or the raw data) hold. All problems are listed. Exit codes: 0 sound, 2 not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medgemma_korean import cli, progress, records
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.stage import check_outputs, no_record, read_record


def problems_of(record_path: Path, paths: RunPaths) -> list[str]:
    """What is wrong with one complete stage. A damaged record is a problem, not an end."""
    try:
        record = read_record(record_path)
        found = check_outputs(record_path, thorough=True) + progress.changed_inputs(record_path, paths, thorough=True)
        if records.digest_of(record["identity"]) != record["fingerprint"]:
            found.append(f"{show(record_path)}: the fingerprint is not that of its identity")
    except PipelineError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError):
        return [str(no_record(record_path))]
    return found


def make_parser() -> argparse.ArgumentParser:
    return cli.make_parser(__doc__, force=False)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    found: list[str] = []
    checked = 0
    for programs in progress.records_of(paths, profile.tiny is not None).values():
        for program, record_path in programs.items():
            if not record_path.is_file():
                continue
            problems = problems_of(record_path, paths)
            checked += 1
            print(f"{program:30}{'sound' if not problems else cli.count(len(problems), 'problem')}", flush=True)
            found += [f"{program}: {problem}" for problem in problems]
    if not checked:
        raise PipelineError(f"the run {paths.name} has no complete stage to verify; ./run_full_pipeline.sh makes them")
    if found:
        raise PipelineError(
            f"{cli.count(len(found), 'problem')}:\n  "
            + "\n  ".join(found)
            + "\nBring back what was there, or make that stage again with --force (old results are kept as .previous)."
        )
    print(f"{cli.count(checked, 'complete stage')}, all sound")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

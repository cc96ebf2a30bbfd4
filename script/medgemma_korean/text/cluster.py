"""Pass 1 of plain-text refinement by datatrove's executors: on this machine, on a Slurm cluster, on Ray.

    if spread("slurm", jobs, exams, logs, ...):    # True: the shards are there; False: jobs of the cluster go on alone

A pipeline of one step, in which a task calls shards.refine_shard for its share of the jobs; what is done, is left out,
as everywhere. Passes 2 and 3 need all shards. On Slurm they are one more job, which waits for the others and runs the
same program with `--executor local`. All machines must see the data folder, the logs and the environment under the
same paths.

datatrove is optional: pip install -e '.[cluster]'. Ray 2.60 was tried on one machine, of Slurm what it is told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import cli, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.text import shards
from medgemma_korean.workers import available, one_thread_each

EXECUTORS = ("local", "datatrove-local", "slurm", "ray")
# A shard takes about ten seconds, and starting a task of a cluster as long.
SHARDS_A_TASK = 16
MEMORY_GB = 2  # for each processor; a worker needs 0.5
LAST_JOB_CPUS = 8


@dataclass(frozen=True)
class Slurm:
    """What only the user knows of a cluster. time: limit of a task; options: for sbatch, such as {"account": "x"}."""

    partition: str
    time: str = "02:00:00"
    options: dict[str, str] = field(default_factory=dict)


class RefineShards:
    """A step of a datatrove pipeline: task `rank` of `world_size` makes its share of the shards."""

    prepared = ""  # the exam items whose indexes this process has

    def __init__(self, jobs: Sequence[shards.Job], exams: shards.Exams) -> None:
        self.jobs, self.exams, self.rules = list(jobs), exams, shards.rules_digest()

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        if shards.rules_digest() != self.rules:
            raise PipelineError("the code on this machine, or one of its libraries, is not that of the submitting one")
        todo = [job for job in self.jobs[rank::world_size] if not job.done]
        if todo and RefineShards.prepared != todo[0].exams:
            shards.prepare(self.exams)
            RefineShards.prepared = todo[0].exams
        for job in todo:
            try:
                shards.work(job)
            except PipelineError as error:
                from loguru import logger

                # The reason is one line of the task's log; datatrove would add a traceback with every variable.
                logger.error("{}", error)
                logger.remove()
                raise


class Run:
    """A step of a datatrove pipeline: one command."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        subprocess.run(self.command, check=True)


def spread(
    executor: str,
    jobs: Sequence[shards.Job],
    exams: shards.Exams,
    logs: Path,
    *,
    workers: int | None,
    slurm: Slurm | None,
    again: Sequence[str],
) -> bool:
    """Make the shards that are not there yet; False when they are left to a cluster's queue.

    workers: tasks at a time. again: the command that finishes once the shards are there. Raises PipelineError without
    datatrove, or ray.
    """
    todo = [job for job in jobs if not job.done]
    if not todo:
        return True
    if executor == "slurm" and not shutil.which("sbatch"):
        raise PipelineError("--executor slurm: there is no sbatch on this machine; run it where jobs are submitted")
    # Slurm hands the environment on.
    one_thread_each()
    os.environ.setdefault("LOGURU_DIAGNOSE", "NO")  # the variables of a traceback hold texts
    step = RefineShards(todo, exams)
    # One folder for what is to be made: datatrove knows tasks by their number, which says nothing of other files or
    # rules. Whether a shard is there, the shard says.
    folder = logs / records.digest_of([job.name for job in todo])[:16]
    tasks = len(todo) if executor == "datatrove-local" else -(-len(todo) // SHARDS_A_TASK)
    common = {"pipeline": [step], "tasks": tasks, "logging_dir": str(folder), "skip_completed": False}
    try:
        _executor(executor, common, workers, slurm, again).run()
    except ImportError as error:
        needed = "ray" if "ray" in str(error) else "datatrove"
        extra = "'datatrove[ray]'" if needed == "ray" else "-e '.[cluster]'"
        raise PipelineError(f"--executor {executor} needs {needed}: .venv/bin/pip install {extra}") from None
    if executor == "slurm":
        tasks_ = cli.count(tasks, "task")
        log.info("%s queued for %s, and one for the rest; logs in %s", tasks_, _shards(todo), show(folder))
        return False
    if left := [job for job in todo if not job.done]:
        raise PipelineError(f"{_shards(left)} of {len(todo):,} not made; the reason is in {show(folder)}/logs")
    return True


def _executor(executor: str, common: dict[str, Any], workers: int | None, slurm: Slurm | None, again: Sequence[str]):  # noqa: ANN202
    """The executor of datatrove, or the last of those that wait for each other."""
    if executor == "datatrove-local":
        from datatrove.executor import LocalPipelineExecutor

        return LocalPipelineExecutor(**common, workers=min(workers or available(), common["tasks"]))
    if executor == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor(**common, workers=workers or -1, mem_per_cpu_gb=MEMORY_GB)
    from datatrove.executor import SlurmPipelineExecutor

    assert slurm is not None
    cluster = {
        "time": slurm.time,
        "partition": slurm.partition,
        "mem_per_cpu_gb": MEMORY_GB,
        "qos": None,
        "sbatch_args": slurm.options,
        "venv_path": str(Path(sys.executable).with_name("activate")),
    }
    first = SlurmPipelineExecutor(**common, **cluster, workers=workers or -1, job_name="refine_00_shards")
    last = common | {"pipeline": [Run(again)], "tasks": 1, "logging_dir": f"{common['logging_dir']}/last"}
    return SlurmPipelineExecutor(
        **last, **cluster, cpus_per_task=LAST_JOB_CPUS, job_name="refine_00_rest", depends=first
    )


def _shards(jobs: Sequence[shards.Job]) -> str:
    return cli.count(len(jobs), "shard")

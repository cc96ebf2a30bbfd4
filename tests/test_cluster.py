"""Shards made by datatrove's executors: the same bytes as without them. Skipped where datatrove is not installed.

Slurm is played by four small scripts: what is submitted is kept, and then run as a cluster would run it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medgemma_korean.cli import PipelineError

INSTALLED = importlib.util.find_spec("datatrove") is not None
with_datatrove = pytest.mark.skipif(not INSTALLED, reason="datatrove is not installed")
COMMANDS = {
    "sbatch": """
        number=$(($(ls "$QUEUE" | grep -c sh$) + 1))
        cp "${@: -1}" "$QUEUE/$number.sh"
        echo "$@" > "$QUEUE/$number.arguments"
        echo "Submitted batch job $number"
    """,
    "srun": """
        while [[ $1 != launch_pickled_pipeline ]]; do shift; done
        exec "$@"
    """,
    "scontrol": "echo localhost",
    "merge_stats": "true",
}


def outputs(root: Path) -> dict[str, bytes]:
    refined = root / "data/sample/02_refined"
    return {str(f.relative_to(refined)): f.read_bytes() for f in sorted(refined.glob("00_*/*"))}


@pytest.fixture(scope="module")
def expected(refined_root) -> dict[str, bytes]:
    return outputs(refined_root)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """The queue of a Slurm cluster."""
    commands, queue = tmp_path / "bin", tmp_path / "queue"
    commands.mkdir()
    queue.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (commands / name).chmod(0o755)
    # The folder of Python comes after, for launch_pickled_pipeline; a job activates its environment itself.
    folders = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", ":".join(folders))
    monkeypatch.setenv("QUEUE", str(queue))
    return queue


def run_job(script: Path, task: int, root: Path) -> None:
    """One task of a job array, as Slurm runs it."""
    text = script.read_text().replace("set -xe", f"set -xe; PATH={os.environ['PATH']}")  # behind what it activates
    env = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost", "RUN_OFFSET": "0"}
    done = subprocess.run(["bash", "-c", text], env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_without_datatrove_one_message_says_how_to_install_it(root, run_program, monkeypatch):
    absent = root / "absent"
    absent.mkdir()
    (absent / "datatrove.py").write_text("raise ModuleNotFoundError(\"No module named 'datatrove'\")")
    monkeypatch.setenv("PYTHONPATH", str(absent))
    done = run_program("refine_00_plain_text", "--executor", "datatrove-local")
    assert done.code == 2
    assert done.text.strip().splitlines()[-1] == (
        "error: --executor datatrove-local needs datatrove: .venv/bin/pip install -e '.[cluster]'"
    )
    assert outputs(root) == {}


def test_slurm_needs_a_partition(root, run_program):
    done = run_program("refine_00_plain_text", "--executor", "slurm")
    assert (done.code, "name a partition with --partition" in done.text) == (2, True)


@with_datatrove
def test_datatrove_makes_the_same_bytes(root, run_program, expected):
    done = run_program("refine_00_plain_text", "--executor", "datatrove-local", "--workers", "2")
    assert done.code == 0, done.text
    assert "4 of 4 shards are there already" in done.text  # and none is left for the program itself
    assert outputs(root) == expected
    assert not (root / "data/sample/02_refined/.shards").exists()


@with_datatrove
def test_what_cannot_be_read_is_one_message(root, run_program):
    file = root / "data/sample/01_raw/00_korean/namu_wiki/train.jsonl"
    file.write_bytes(file.read_bytes() + b"\xff\n")
    done = run_program("refine_00_plain_text", "--executor", "datatrove-local")
    assert done.code == 2
    assert re.search(r"^error: .*namu_wiki/train\.jsonl, line 65: ", done.text, re.MULTILINE), done.text[-500:]


@with_datatrove
def test_the_reason_is_one_line_of_a_task_s_log_and_no_traceback_is_printed(root, run_program):
    file = root / "data/sample/01_raw/00_korean/namu_wiki/train.jsonl"
    file.write_bytes(file.read_bytes() + b"\xff\n")
    done = run_program("refine_00_plain_text", "--executor", "datatrove-local", "--workers", "2")
    assert done.code == 2 and "Traceback" not in done.text and "└" not in done.text, done.text
    logs = [log.read_text() for log in (root / "logs").rglob("task_*.log")]
    (named,) = [line for text in logs for line in text.splitlines() if "train.jsonl, line 65: " in line]
    assert "ERROR" in named and not any("Traceback" in text for text in logs)


def test_slurm_needs_its_commands(root, run_program, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = run_program("refine_00_plain_text", "--executor", "slurm", "--partition", "cpu")
    assert (done.code, "there is no sbatch on this machine" in done.text, "Traceback" in done.text) == (2, True, False)


@with_datatrove
def test_slurm_runs_the_shards_and_then_the_rest(root, run_program, expected, cluster, monkeypatch):
    from medgemma_korean.text import cluster as module

    options = ["--partition", "cpu", "--time", "00:30:00", "--sbatch", "account=lab", "--workers", "8"]
    done = run_program("refine_00_plain_text", "--executor", "slurm", *options)
    assert done.code == 0, done.text
    assert "1 task queued for 4 shards, and one for the rest" in done.text
    assert outputs(root) == {}
    first, _, last, _ = (cluster / f"{number}.sh" for number in (1, 2, 3, 4))  # 2 and 4 merge datatrove's statistics
    for line in ("--partition=cpu", "--time=00:30:00", "--account=lab", "--array=0-0%8", "--mem-per-cpu=2G"):
        assert f"#SBATCH {line}\n" in first.read_text()
    assert "#SBATCH --qos" not in first.read_text()
    assert f"source {Path(sys.executable).with_name('activate')}" in first.read_text()
    assert "--dependency=afterok:1" in (cluster / "3.arguments").read_text()
    assert f"#SBATCH --cpus-per-task={module.LAST_JOB_CPUS}\n" in last.read_text()

    run_job(first, 0, root)
    assert outputs(root) == {}
    assert len(list((root / "data/sample/02_refined/.shards").glob("*.json"))) == 4
    run_job(last, 0, root)
    assert outputs(root) == expected
    again = run_program("refine_00_plain_text", "--executor", "slurm", *options)
    assert (again.code, "already complete" in again.text) == (0, True)


@with_datatrove
def test_shards_that_are_there_are_not_queued_again(root, run_program, expected, cluster):
    assert run_program("refine_00_plain_text", "--keep-shards").code == 0
    shutil.rmtree(root / "data/sample/02_refined/.stages")
    for folder in (root / "data/sample/02_refined").glob("00_*"):
        shutil.rmtree(folder)
    done = run_program("refine_00_plain_text", "--executor", "slurm", "--partition", "cpu")
    assert done.code == 0, done.text
    assert (list(cluster.iterdir()), outputs(root)) == ([], expected)


def test_a_machine_with_other_code_makes_no_shards(monkeypatch):
    from medgemma_korean.text import cluster, shards

    step = cluster.RefineShards([], shards.Exams((), ()))
    step(None, 0, 1)
    monkeypatch.setattr(shards, "rules_digest", lambda: "other")
    with pytest.raises(PipelineError, match="is not that of the submitting one"):
        step(None, 0, 1)

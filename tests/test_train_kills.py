"""kill -9 at random moments of every training stage, and the same command again: the bytes of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
KILLS = 5
STEPS = ("--max-steps", "12", "--show-samples-every", "4", "--eval-samples", "8")
# stage -> (program, options, the folders of model/ that it starts from, its own)
STAGES = {
    "00": ("train_00_plain_text", STEPS, ("raw_lora_added",), "00_trained"),
    "01": ("train_01_medical_dict", (*STEPS, "--monitor-every", "3"), ("raw_lora_added", "00_trained"), "01_trained"),
    "02": ("train_02_kor_med_test", STEPS, ("01_another_lora_added",), "02_trained"),
    "loop": (
        "train_01_02_loop",
        ("--max-loops", "3", "--max-samples", "40", "--eval-samples", "8"),
        ("01_another_lora_added",),
        "01_02_loop",
    ),
}
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A whole run of the demonstration, up to the second adapter."""
    root = tmp_path_factory.mktemp("chain")
    shutil.copytree(REPOSITORY / "data" / "sample" / "01_raw", root / "data" / "sample" / "01_raw")
    command = [REPOSITORY / "run_full_pipeline.sh", "--to", "add_lora_second"]
    environment = {**os.environ, "MEDGEMMA_KOREAN_ROOT": str(root)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return root


def start(root, program, options):
    command = [sys.executable, REPOSITORY / "script" / "train" / f"{program}.py", *options, "--allow-regression"]
    environment = {**os.environ, "MEDGEMMA_KOREAN_ROOT": str(root)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(root, program, options):
    process = start(root, program, options)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


def results(folder):
    """What has to be the same: every adapter, the scores and the answers, and what is told of the training."""
    adapters = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/adapter_model.safetensors"))}
    info = json.loads((folder / "training_info.json").read_text())
    record = json.loads((folder / "stage.json").read_text())
    told = {key: record[key] for key in ("steps", "best_step", "loss", "tokens", "counts", "scores", "fingerprint")}
    return adapters, info, told, json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(chain, tmp_path, stage):
    program, options, inputs, own = STAGES[stage]

    def copy(name):
        root = tmp_path / name
        shutil.copytree(chain / "data", root / "data")
        for kind in {*inputs, "raw_lora_added", "report"}:
            shutil.copytree(chain / "model" / kind, root / "model" / kind)
        return root

    began = time.monotonic()
    whole = copy("whole")
    finished(whole, program, options)
    seconds = time.monotonic() - began
    expected = results(whole / "model" / own / "tiny")
    rng = random.Random(stage)
    moments = sorted(rng.uniform(0.15, 1.0) for _ in range(KILLS))
    reached = []
    for number, moment in enumerate(moments):
        root = copy(f"killed {number}")
        process = start(root, program, options)
        time.sleep(moment * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(sorted(p.name for p in (root / "model" / own).rglob("checkpoint-*")))
        finished(root, program, options)
        folder = root / "model" / own / "tiny"
        assert results(folder) == expected, f"killed after {moment:.0%}, with {reached[-1]}"
        assert not list(folder.parent.glob(".*.partial"))
        shutil.rmtree(root)
    print(f"stage {stage}: killed after {', '.join(f'{m:.0%}' for m in moments)} of {seconds:.0f} s, with {reached}")

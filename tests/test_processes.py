"""Training in several processes: the numbers of one, with the base whole in each and divided between them."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch_fixtures as tf

from medgemma_korean import processes

JOB = Path(__file__).with_name("several_processes.py")


def test_alone_there_is_nobody_to_wait_for():
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    processes.start("cpu")
    processes.wait()
    assert processes.agreed({"a": 1}) == {"a": 1}
    assert processes.any_of(True) and not processes.any_of(False)
    assert processes.own_device("cuda:0") == "cuda:0"


def test_every_process_has_its_own_card(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert not processes.is_main()
    assert (processes.own_device("cuda:0"), processes.own_device("cpu")) == ("cuda:1", "cpu")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def launch(number, *arguments):
    command = [sys.executable, *map(str, arguments)]
    if number > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(number)]
        command = [*launcher, "--main_process_port", str(free_port()), *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(JOB.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


LAUNCH = JOB.parents[1] / "script" / "operate" / "launch.py"


@pytest.mark.parametrize(
    "code, expected",
    [
        ("sys.exit(3)", 3),
        ("sys.exit(0 if rank == 0 else 2)", 2),
        ("os.kill(os.getpid(), 9) if rank == 1 else None", 137),
        ("assert (os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK']) == ('2', str(rank))", 0),
        ("signal.signal(15, lambda *_: sys.exit(130)); ready(); time.sleep(60)", 130),
    ],
    ids=["a gate", "one fails", "one is killed", "told", "stopped"],
)
def test_the_launcher_ends_with_what_the_program_ends_with(tmp_path, signals_heard, code, expected):
    job = tmp_path / "job.py"
    marks = [tmp_path / f"ready{rank}" for rank in (0, 1)]
    job.write_text(
        "import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        f"ready = pathlib.Path({str(tmp_path)!r}, f'ready{{rank}}').touch\n{code}\n"
    )
    process = subprocess.Popen([sys.executable, LAUNCH, "2", job], preexec_fn=signals_heard)
    if "ready()" in code:
        while not all(mark.exists() for mark in marks):
            time.sleep(0.05)
        process.terminate()
    assert process.wait(timeout=60) == expected


def test_the_launcher_wants_a_program():
    result = subprocess.run([sys.executable, LAUNCH, "2"], capture_output=True, text=True)
    assert result.returncode == 2 and "no program to start" in result.stderr


def trained(folder, number, how):
    launch(number, JOB, tf.base_folder(), tf.moved_adapter_folder(), folder, how)
    return tf.read(folder / "history.json")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    from safetensors.torch import load_file

    one = trained(tmp_path / "one", 1, "whole")
    assert one["processes"] == 1 and len(one["curve"]) == 6
    for how in ("whole", "shard"):
        two = trained(tmp_path / how, 2, how)
        assert two["processes"] == 2
        for (loss, norm), (loss_of_one, norm_of_one) in zip(two["curve"], one["curve"], strict=True):
            assert loss == pytest.approx(loss_of_one, abs=1e-4)
            assert norm == pytest.approx(norm_of_one, rel=1e-4)
        assert [e["loss"] for e in two["history"]] == pytest.approx([e["loss"] for e in one["history"]], abs=1e-4)
        # One process loads what two have saved, and finds the same model.
        file = f"checkpoint-6/{tf.ADAPTER}"
        ours, theirs = load_file(tmp_path / how / file), load_file(tmp_path / "one" / file)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)
    assert two["held"] < 0.6 * one["held"]  # each of two holds about half


@pytest.mark.full
def test_a_sharded_training_continues_with_its_optimizer_and_in_no_other_number_of_processes(tmp_path):
    two = trained(tmp_path / "shard", 2, "shard")
    shutil.rmtree(tmp_path / "shard" / "checkpoint-6")
    again = trained(tmp_path / "shard", 2, "shard")
    assert again["curve"] == two["curve"] and again["history"] == two["history"]
    with pytest.raises(AssertionError, match="was begun with 2 processes, and 1 run now"):
        trained(tmp_path / "shard", 1, "whole")

"""bench_training.py, small: every variant is measured, what must be equal is equal, and the numbers are numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("bench_training.py")
SMALL = ["--shape", "2,32,64,2,1,16", "--ids", "700", "--new-tokens", "60", "--rank", "4", "--device", "cpu"]
SMALL += ["--length", "32", "--accumulation", "2", "--steps", "1", "--rounds", "1"]
VARIANTS = ["frozen", "ours", "library", "modules_to_save"]
# Rank x (inputs + outputs) of q, k, v, o, gate, up, down, of two layers.
LORA = 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_training", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROGRAM.parent)  # as Python does for a program
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_variants_differ_only_in_what_trains(bench):
    import torch

    args = bench.make_parser().parse_args(SMALL)
    runs = {variant: bench.measure(variant, "fp32", torch.float32, "cpu", False, args) for variant in VARIANTS}
    rows = {"frozen": 0, "ours": 60 * 32, "library": 60 * 32, "modules_to_save": 2 * 768 * 32}
    for variant, run in runs.items():
        assert run["trainable"] == {"lora": LORA, "rows": rows[variant]}
    # The first pass is the same in all; after it the trained rows differ, and the two ways of training them do not.
    assert len({run["loss"][0] for run in runs.values()}) == 1
    assert math.log(700) - 0.5 < runs["ours"]["loss"][0] < math.log(768) + 0.5
    ours, library = runs["ours"], runs["library"]
    assert ours["rows_grad_norm"] == pytest.approx(library["rows_grad_norm"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(library["grad_norm"], rel=1e-5)
    assert ours["loss"][1] == pytest.approx(library["loss"][1], rel=1e-6)
    assert len({round(run["loss"][1], 5) for run in runs.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["8bit", "nf4", "bf16"])
def test_precisions_give_the_same_gradients_in_both_ways(bench, precision):
    import torch

    args = bench.make_parser().parse_args(SMALL)
    ours, library = (
        bench.measure(variant, precision, torch.bfloat16, "cpu", True, args) for variant in ("ours", "library")
    )
    assert ours["loss"][0] == library["loss"][0]
    # Products of bfloat16 are summed in another order.
    assert ours["rows_grad_norm"] == pytest.approx(library["rows_grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_the_program_measures_each_in_a_process(tmp_path):
    command = [sys.executable, PROGRAM, *SMALL, "--precision", "fp32", "--variants", "frozen,ours"]
    done = subprocess.run([*command, "--json", tmp_path / "n"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "n").read_text())
    assert numbers["shape"]["rows"] == 768 and numbers["new_tokens"] == 60
    assert list(numbers["runs"]["fp32"]) == ["frozen", "ours"]
    for (run,) in numbers["runs"]["fp32"].values():
        assert len(run["seconds"]) == 1 and 0 < run["seconds"][0] < 100 and 0 < run["cpu"][0] < 100
        assert 1e8 < run["peak"] < 4e9 and 1e9 < run["predicted"] < 1.1e9
    machine, what, _, *table = done.stdout.splitlines()
    assert "; torch " in machine and "2 layers of width 32, 768 rows, 60 of them new" in what
    assert [line.split(" | ")[1] for line in table[2:]] == ["frozen", "ours"]


def test_real_shapes_and_their_parameters(bench):
    expected = {"4b": (34, 119.2, 25.6, 1393.6), "27b": (62, 227.0, 53.8, 2926.6)}
    for shape, (layers, *millions) in expected.items():
        profile, found, new = bench.model_of(bench.make_parser().parse_args(["--shape", shape]))
        assert (found.layers, found.rows, new) == (layers, 272_192, 10_000)
        ours, whole = (bench.trainable(name, profile, found, new) for name in ("ours", "modules_to_save"))
        assert [round(n / 1e6, 1) for n in (ours["lora"], ours["rows"], whole["rows"])] == millions


def test_what_does_not_fit_is_a_row(bench):
    planned = {"predicted": 5e9, "trainable": {"lora": 10**6, "rows": 0}}
    run = planned | {"seconds": [2.0, 4.0, 3.0], "cpu": [1.0] * 3, "peak": 2**31}
    table = list(bench.lines({"bf16": {"frozen": [run], "library": [planned | {"out_of_memory": "why"}]}}, 1024))
    assert table[2] == "| bf16 | frozen | 3 | 2 to 4 | 341 | 1.00 | 2.15 | 1 | 5.0 | 1.0 M | 0.0 M |"
    assert table[3] == "| bf16 | library | out of memory |  |  |  |  |  | 5.0 | 1.0 M | 0.0 M |"


def test_predictions_need_no_card(bench, capsys):
    assert bench.main(["--shape", "27b", "--precision", "8bit,nf4", "--predict"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[:2] for line in lines[1:]] == [[p, v] for p in ("8bit", "nf4") for v in VARIANTS]
    for precision in (lines[1:5], lines[5:]):
        frozen, ours, library, whole = (float(line[2]) for line in precision)
        assert frozen < ours < library < whole

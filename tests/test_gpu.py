"""The CUDA path, for machines that have one: 8-bit training with new token rows through the shipped program."""

from __future__ import annotations

import json
import math

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_stage_00_trains_in_8bit_on_the_gpu(root, run_program):
    for name, *options in (
        ("build_tiny_model",),
        ("refine_all",),
        ("prepare_tokenizer",),
        ("add_lora", "--device", "cuda:0"),
        ("train_00_plain_text", "--device", "cuda:0", "--max-steps", "6"),
    ):
        outcome = run_program(name, *options, root=root)
        assert outcome.code == 0, outcome.text[-3000:]
    folder = root / "model" / "00_trained" / "tiny"
    record = json.loads((folder / "stage.json").read_text())
    assert record["steps"] == 6 and math.isfinite(record["loss"])
    assert record["trainable"]["rows"] > 0 and record["trainable"]["lora"] > 0

"""A small training for `accelerate launch`, as test_processes.py starts it: several_processes.py BASE ADAPTER OUT HOW

HOW is "whole" (each process holds the base) or "shard" (the base is divided). Writes OUT/history.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch_fixtures as tf

from medgemma_korean import evaluation, modeling, processes, training
from medgemma_korean import tokenizer as tokenizers


class Stage:
    program = "train_several"

    def tick(self, *values):
        pass


def main(base: Path, adapter: Path, out: Path, how: str) -> None:
    tokenizer = tokenizers.load(base)
    tf.tokenizer, tf.base_folder = (lambda: tokenizer), (lambda: base)
    processes.start("cpu")
    model = tf.trainable_model("fp32", adapter)
    if how == "shard":
        processes.shard(model, "cpu")
    held_out = tf.exchanges(3, seed=9)
    plan = training.Plan(
        rows=tf.exchanges(24),
        settings=tf.stage_settings(evaluations=2, max_forgetting=9.0),
        packed=False,
        metric="loss",
        larger=False,
        evaluate=lambda model: {"loss": evaluation.completion_loss(model, held_out, tokenizer, 4)},
        monitor=lambda model: {"korean_bits": evaluation.bits_per_character(model, tokenizer, tf.texts(2), 32, 4)},
        rows_only_steps=2,
    )
    if processes.is_main():
        out.mkdir(exist_ok=True)
    processes.wait()
    sharded = how == "shard"
    outcome = training.train(model, tokenizer, plan, out, tf.profile(), tf.paths(), Stage(), adapter, (), sharded)
    with processes.gathered(model):
        after = plan.evaluate(model)["loss"]
    if processes.is_main():
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
        state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
        curve = [[e["loss"], e["grad_norm"]] for e in state["log_history"] if "loss" in e]
        found = {
            "curve": curve,
            "history": outcome.history,
            "after": after,
            "held": held,
            "processes": processes.count(),
        }
        (out / "history.json").write_text(json.dumps(found))


if __name__ == "__main__":
    modeling.CPU_THREADS = 1
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])

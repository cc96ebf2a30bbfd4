"""A run with every file that a report reads, its numbers different everywhere; several test files share it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch_fixtures as tf

from medgemma_korean import mcq, prompts, records, report
from medgemma_korean.paths import RunPaths
from medgemma_korean.stage import RECORD_NAME, vouch

NAMES = ["base", "extended", "00", "01", "merged", "02"]
HOSTILE = "<script>alert('x')</script> \"&amp;\" 답 </dd></div><img src=http://example.org/a.png onerror=x>"


def evaluation_of(name: str, right: int, number: int = 60, seed: int = 1) -> dict[str, Any]:
    """An evaluation with `right` of `number` items right and numbers that occur nowhere else."""
    rng = random.Random(f"{name}/{seed}")
    rows = []
    for i in range(number):
        gold = "ABCDE"[i % 5]
        predicted = gold if i < right else "ABCDE"[(i + 1) % 5]
        exam = ("doctor", "nurse")[i % 2]
        rows.append({"id": str(i), "exam": exam, "gold": gold, "predicted": predicted, "reason": "x"})
    return {
        "which": name,
        "precision": "8bit",
        "protocol": "letter",
        "split": "dev",
        "items": f"digest of {number}",
        "mcq": mcq.score(rows),
        "bits_per_character": {k: rng.uniform(2, 9) for k in ("korean", "medical", "english")},
        "tokens_per_character": {k: rng.uniform(0.1, 0.9) for k in ("korean", "medical", "english")},
        "predictions": rows,
        "samples": [{"prompt": f"{name}: <b>A & B?</b>", "answer": f'{name} "답"<end_of_turn>'}],
    }


def record_of(name: str, number: int) -> dict[str, Any]:
    gate = {"passed": name != "01", "reasons": [], "p": 0.5 + number / 1000, "english_ratio": 1.02 + number / 1000}
    gate["reasons"] = [] if gate["passed"] else ["dev accuracy fell <far>"]
    return {
        "program": f"train_{name}",
        "gate": gate,
        "trainable": {"lora": 12000, "rows": 345 + number},
        "warnings": [f"{name} was odd"] if name == "02" else [],
        "settings": {"learning_rate": 0.001 * number, "max_steps": None, "precision": "8bit", "shuffle": True},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "steps": 40 + number,
        "tokens": 172739 + number,
        "best_step": 30 + number,
        "loss": 6.5 + number / 7,
        "micro_batch": 2,
        "processes": 1,
        "seconds": 203.7 + number,
        "peak_memory": {"main": 1_234_000_000 + 10**7 * number, **({"gpu": 9_876_000_000} if name == "02" else {})},
    }


def training_of(folder: Path, number: int) -> None:
    """Checkpoints with the trainer's log, the last one with all of it, and the looks."""
    steps = 40 + number
    log = [
        {"step": s, "loss": 7 * math.exp(-s / 30) + number, "learning_rate": 1e-3 * (1 - s / 50), "grad_norm": 1.0}
        for s in range(1, steps + 1)
    ]
    for last in (9, steps):
        state = {"global_step": last, "log_history": [*log[:last], {"step": last, "evaluation": {"step": last}}]}
        records.write_json(folder / f"checkpoint-{last}" / "trainer_state.json", state)
    looks = []
    for step in (10, 20, steps):
        score = mcq.score(evaluation_of("x", right=step)["predictions"])
        looks.append(
            {"step": step, "korean_bits": 5 + 1 / step, "english_bits": 3 + 1 / step, "forgetting": 0.01}
            | {key: score[key] for key in ("accuracy", "lower", "upper")}
        )
    records.write_json(folder / "training_info.json", {"validation_history": looks})


def whole_run(name: str | None = None) -> RunPaths:
    """A run with every evaluation and record that a report reads."""
    found = tf.paths()
    if name:
        found = RunPaths(found.model, found.data, name)
    places = [found.scores("base"), found.scores("extended"), found.trained_00, found.trained_01]
    places += [found.scores("merged"), found.trained_02]
    for number, (stage, place) in enumerate(zip(NAMES, places, strict=True)):
        trained = place.suffix != ".json"
        scores = evaluation_of(stage, right=12 + 6 * number)
        if trained:
            scores["against_base"] = {
                "before": "base",
                "wrong_to_right": number,
                "right_to_wrong": 1,
                "p": 0.011 * number,
            }
            records.write_json(place / RECORD_NAME, record_of(stage, number))
            training_of(place, number)
        records.write_json(place / "evaluation.json" if trained else place, scores)
    records.write_json(
        found.refined / ".stages" / "refine_00.json",
        {"counts": {"kept": 1234, "dropped": {"short": [1, 2], "v1.5 %": 77, "none": 0}}},
    )
    records.write_json(found.tokenizer / "tokenizer_info.json", {"new_tokens": 1024})
    failed = {"question_id": "q<7>", "fail_count": 2, "expected": "B", "last_predicted": None, "last_failed_step": 20}
    questions = [failed | {"question_preview": "다음 중 <옳은> 것은?"}]
    records.write_json(
        found.trained_02 / report.FAILED, {"split": "dev", "looks": [10, 20, 45], "questions": questions}
    )
    line = {"name": "use", "passed": True, "text": "96 % are used"}
    bits = {"korean": 6.1, "medical": 7.3, "english": 3.08}
    verdict = {
        "verdict": "extend",
        "reason": "because <it> helps",
        "lines": [line],
        "base": bits,
        "rows": {
            "mean of constituents": {**bits, "english_mass": 0.018},
            "library default": {**bits, "english_mass": 0.5},
        },
    }
    records.write_json(found.raw_lora_added / "verdict.json", verdict)
    score = evaluation_of("02", right=31)["mcq"]
    clean = {"n": 53, "correct": 27, "accuracy": 27 / 53, "lower": 0.379, "upper": 0.64}
    validation = {
        "split": "test",
        "mode": "letter",
        "models": {
            "base": {"mcq": score, "contamination": {"clean": clean, "touched": None}},
            "02": {
                "mcq": score | {"refused": 4},
                "against_first": {"p": 0.25},
                "rotations": {"vote_accuracy": 0.456, "mean_accuracy": 0.412, "consistency": 0.387},
            },
        },
    }
    records.write_json(found.report / "validation" / "test-letter.json", validation)
    records.write_json(found.report / "test_looks.json", [{"mode": "letter"}] * 3)
    vouch("validation_kor_med_test", [found.report / "test_looks.json"], 0.0)
    texts: list[str] = []
    for number, split in enumerate(("dev", "test"), 1):
        items = [
            {"id": str(i), "exam": "doctor", "question": f"{split} {i}번 환자의 가장 알맞은 다음 처치는 무엇인가?",
             **{letter: f"{split}의 보기 {letter} {i * 7}" for letter in "ABCDE"}, "answer": "ABCDE"[i % 5]}
            for i in range(60)
        ]  # fmt: skip
        records.write_jsonl(found.mcq / f"{split}.jsonl", items)
        seen = [f"앞글 {item['question']}\n{prompts.options(item)} 뒷글" for item in items[: 7 * number]]
        texts += seen
    records.write_jsonl(found.plain_text / "train.jsonl", [{"text": text} for text in [*texts, "다른 글"]])
    records.write_json(found.characters, [{"term": "℃", "definition": "섭씨 온도"}] * 9)
    return found

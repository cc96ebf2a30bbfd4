"""The official protocol through lm-evaluation-harness: its command line gives the same numbers, and so do letters."""

import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch_fixtures as tf

from medgemma_korean import evaluation, harness, mcq, prompts, records
from medgemma_korean.cli import PipelineError

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def five(number, seed=3):
    """Items of five options, made of the fixtures' words."""
    rng, words = random.Random(seed), " ".join(tf.KOREAN).split()
    return [
        {
            "id": f"{('doctor', 'nurse')[i % 2]}-2020-1-{i}",
            "exam": ("doctor", "nurse")[i % 2],
            "question": " ".join(rng.sample(words, rng.randint(2, 20))),
            **{letter: " ".join(rng.sample(words, rng.randint(1, 3))) for letter in "ABCDE"},
            "answer": "ABCDE"[i % 5],
        }
        for i in range(number)
    ]


# without the harness ------------------------------------------------------------------------------------


def test_a_missing_harness_is_one_clear_error(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(PipelineError, match=r"not installed; run: .venv/bin/pip install 'lm_eval>=0.4.13'$"):
        harness.require()


@pytest.mark.parametrize(("version", "fine"), [("0.4.12", False), ("0.4.9.1", False), ("0.4.13", True), ("0.5", True)])
def test_an_old_harness_is_refused(monkeypatch, version, fine):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    if fine:
        assert harness.require() == version
    else:
        with pytest.raises(PipelineError, match=f"lm_eval {version} has an older protocol"):
            harness.require()


def test_what_the_official_prompt_cannot_show_is_refused(tmp_path):
    items = five(4)
    del items[2]["E"]
    with pytest.raises(PipelineError, match="1 of the questions have fewer, first doctor-2020-1-2"):
        harness.write_tasks(tmp_path, items, [], 0)
    with pytest.raises(PipelineError, match="--shots 2: doctor has 1 rows of five options"):
        harness.write_tasks(tmp_path, five(4), five(2), 2)
    with pytest.raises(PipelineError, match="--shots 2: nurse has 1 rows of five options"):
        harness.write_tasks(tmp_path, five(4), five(3), 2)
    assert not list(tmp_path.iterdir())  # not even of the exam that has enough


def test_a_question_that_stands_solved_in_its_own_prompt_is_left_out():
    items = five(12)
    turned = mcq.rotated(items[1], 2) | {"id": "nurse-1999-1-1", "question": items[1]["question"] + "  "}
    fewshot = [items[4], turned, items[2], items[3]]  # doctor: 4, 2; nurse: 1 in other words and order, 3
    for shots, left in ((0, set()), (1, {4, 1}), (2, {4, 1, 2, 3})):
        kept = harness.without_shots(items, fewshot, shots)
        assert kept == [item for i, item in enumerate(items) if i not in left]
    other = {**items[4], "exam": "nurse"}  # another exam's prompts do not hold that shot
    assert harness.without_shots([other, items[1]], fewshot, 1) == [other]
    with pytest.raises(PipelineError, match="--shots 3: doctor has 2 rows"):
        harness.without_shots(items, fewshot, 3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("metadata:\n  version: 3.0\n", None),
        ("metadata:\n  version: 2.0\n", "2.0"),
        ("a: 3.0\n", "none in "),
        (None, "none in "),
    ],
)
def test_another_version_of_the_task_is_found_in_its_file(monkeypatch, tmp_path, text, told):
    origin = tmp_path / "lm_eval" / "__init__.py"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(origin)))
    if text:
        records.write_text(origin.parent / "tasks" / "kormedmcqa" / "_template_yaml", text)
    if told is None:
        harness.require_task()
        return
    with pytest.raises(
        PipelineError, match=rf"another version of the task \({told}.*this project knows 3.0; run: .venv"
    ):
        harness.require_task()


# with it ------------------------------------------------------------------------------------------------


@installed
def test_the_installed_task_is_the_known_one():
    harness.require_task()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder of a model that ends its answers, most of them with a letter, some with a sentence."""
    import shutil

    import torch

    from medgemma_korean import modeling

    folder = tmp_path_factory.mktemp("taught") / "base"
    modeling.set_up_torch(3)
    scored = tf.text_model(tf.base_folder()).requires_grad_(True)
    rows = []
    for i, item in enumerate(five(24)):
        ids = tf.tokenizer()(official(item), add_special_tokens=True)["input_ids"]
        answer = [f" {item['answer']}", f"정답: {item['answer']}", f"{item['answer']}입니다", "모르겠다"][i % 4]
        whole = [*ids, *tf.tokenizer()(answer, add_special_tokens=False)["input_ids"], tf.tokenizer().eos_token_id]
        rows.append((torch.tensor([whole]), torch.tensor([[-100] * len(ids) + whole[len(ids) :]])))
    optimizer = torch.optim.AdamW(scored.parameters(), lr=3e-3)
    for _ in range(8):
        for ids, labels in rows:
            scored(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    shutil.copytree(tf.base_folder(), folder)
    modeling.save_model(scored.eval(), folder)
    config = records.read_json(folder / "config.json")
    records.write_json(folder / "config.json", {**config, "max_position_embeddings": 4096})  # 1,024 may be generated
    return folder


def official(item):
    options = "".join(f"\n{letter}. {item[letter]}" for letter in "ABCDE")
    return f"{item['question']}{options}\n정답："


@installed
@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2])
def test_the_command_line_of_the_harness_gives_the_same_numbers(taught, tmp_path, shots):
    items = five(24)
    names = harness.write_tasks(tmp_path / "tasks", items, five(8, seed=9), shots)
    assert names == ["kormedmcqa_doctor", "kormedmcqa_nurse"]
    scored, tokenizer = tf.text_model(taught), tf.tokenizer()
    rows, found = harness.score(scored, tokenizer, tmp_path / "tasks", names, items, shots=shots, batch=4)
    assert [row["id"] for row in rows] == [item["id"] for item in items]
    assert found["task_version"] == 3.0 and found["shots"] == shots
    score = mcq.score(rows)
    assert score["accuracy"] == pytest.approx(found["micro"], abs=1e-12)
    assert {f"kormedmcqa_{k}": exam["accuracy"] for k, exam in score["exams"].items()} == found["exact_match"]
    if not shots:
        assert score["correct"] and 0 < score["unparsed"] < len(items)  # else the comparison would say little
        assert set(score["unparsed_reasons"]) == {harness.NO_LETTER}

    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(names), "--batch_size", "4"]
    command += ["--model_args", f"pretrained={taught},dtype=float32", "--device", "cpu", "--log_samples"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    command += ["--num_fewshot", str(shots)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = records.read_json(file)
    assert {k: theirs["results"][k]["exact_match,extract_answer"] for k in names} == found["exact_match"]
    assert all(float(theirs["versions"][k]) == 3.0 for k in names)
    outputs = {}
    for file in (tmp_path / "out").rglob("samples_*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            outputs[sample["doc"]["id"]] = sample["resps"][0][0]
    assert outputs == {row["id"]: row["output"] for row in rows}


@installed
def test_log_likelihoods_of_the_harness_are_the_letter_scores():
    """The same prompts and letters through HFLM's own log-likelihood, 200 items, float32; and every item alone."""
    from lm_eval.api.instance import Instance

    items, tokenizer = five(200), tf.tokenizer()
    scored = tf.trainable_model("fp32", tf.moved_adapter_folder()).eval()
    ours = evaluation.score_letters(scored, tokenizer, items, batch=16)
    contexts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts.mcq_direct(item)}], add_generation_prompt=True, tokenize=False
        )
        for item in items
    ]
    wrapped = harness.wrapped(scored, tokenizer, 16)
    encoded = [wrapped.tok_encode(context) for context in contexts]
    assert encoded == [prompts.render(tokenizer, prompts.mcq_direct(item))[0] for item in items]
    ids = evaluation.letter_ids(tokenizer)
    pairs = [(i, letter) for i in range(len(items)) for letter in "ABCDE"]
    by_tokens = wrapped._loglikelihood_tokens(
        [((contexts[i], letter), encoded[i], [ids[letter]]) for i, letter in pairs], disable_tqdm=True
    )
    # Given as text, the line break that ends the prompt counts to the answer: the same for all letters of an item.
    by_text = wrapped.loglikelihood(
        [Instance("loglikelihood", {}, (contexts[i], letter), i) for i, letter in pairs], disable_tqdm=True
    )
    apart = moved = 0.0
    for i, row in enumerate(ours):
        own = [row["log_probs"][letter] for letter in "ABCDE"]
        theirs, text = ([value for value, _ in found[5 * i : 5 * i + 5]] for found in (by_tokens, by_text))
        apart = max(apart, *(abs(a - b) for a, b in zip(own, theirs, strict=True)))
        moved = max(moved, *(abs((a - own[0]) - (b - text[0])) for a, b in zip(own, text, strict=True)))
        assert "ABCDE"[theirs.index(max(theirs))] == "ABCDE"[text.index(max(text))] == row["predicted"]
    print(f"200 items: log-probabilities at most {apart:.1e} apart, differences between letters {moved:.1e}")
    assert apart < 1e-4 and moved < 1e-4
    alone = evaluation.score_letters(scored, tokenizer, items, batch=1)
    assert [row["predicted"] for row in alone] == [row["predicted"] for row in ours]
    assert len({row["predicted"] for row in ours}) > 1

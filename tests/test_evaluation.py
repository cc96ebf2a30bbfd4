"""Letter scores and bits per character against direct computations, and a gate that must open and close."""

import copy
import dataclasses
import functools
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch_fixtures as tf

from medgemma_korean import base_model, evaluation, mcq, modeling, prompts, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError


def model(precision="fp32"):
    """The base with an adapter that has moved, as scoring sees it after a stage."""
    return tf.trainable_model(precision, tf.moved_adapter_folder()).eval()


# letters ------------------------------------------------------------------------------------------------


def test_letters_are_single_tokens_after_the_generation_prompt():
    tokenizer = tf.tokenizer()
    ids = evaluation.letter_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(ids.values())) == list("ABCDE") == list(ids)
    prompt, _ = prompts.render(tokenizer, prompts.mcq_direct(tf.ITEMS[0]))
    assert tokenizer.decode(prompt).endswith("<start_of_turn>model\n")


def test_letter_scores_are_those_of_the_whole_logits():
    import torch

    tokenizer, scored = tf.tokenizer(), model()
    found = evaluation.score_letters(scored, tokenizer, tf.ITEMS, batch=1)
    ids = evaluation.letter_ids(tokenizer)
    for item, row in zip(tf.ITEMS, found, strict=True):
        prompt, _ = prompts.render(tokenizer, prompts.mcq_direct(item))
        log_probs = torch.log_softmax(tf.logits(scored, prompt)[-1], dim=-1)
        letters = prompts.letters_of(item)
        assert row["log_probs"] == {k: pytest.approx(log_probs[ids[k]].item(), abs=2e-5) for k in letters}
        assert row["predicted"] == max(letters, key=lambda k: log_probs[ids[k]])
        assert (row["id"], row["exam"], row["gold"]) == (item["id"], item["exam"], item["answer"])
    assert len({row["predicted"] for row in found}) > 1  # else the comparison would say little


@pytest.mark.parametrize("batch", [2, 5, 12, 50])
def test_batches_padded_on_the_left_give_the_same_scores(batch):
    scored = model()
    alone = evaluation.score_letters(scored, tf.tokenizer(), tf.ITEMS, batch=1)
    ticks = []
    together = evaluation.score_letters(
        scored, tf.tokenizer(), tf.ITEMS, batch, tick=lambda done, total: ticks.append((done, total))
    )
    assert ticks[-1] == (len(tf.ITEMS), len(tf.ITEMS))
    for one, other in zip(alone, together, strict=True):
        assert one["predicted"] == other["predicted"] and one["id"] == other["id"]
        assert one["log_probs"] == {k: pytest.approx(v, abs=2e-5) for k, v in other["log_probs"].items()}


def test_four_options_never_give_e():
    four = [item for item in tf.ITEMS if "E" not in item]
    assert four
    rows = evaluation.score_letters(model(), tf.tokenizer(), four, 4)
    assert all(set(row["log_probs"]) == set("ABCD") and row["predicted"] in "ABCD" for row in rows)
    empty = [{**item, "E": ""} for item in four]
    assert evaluation.score_letters(model(), tf.tokenizer(), empty, 4) == rows


def test_scores_that_are_not_finite_are_unparsed():
    broken = model()
    next(p for n, p in broken.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    rows = evaluation.score_letters(broken, tf.tokenizer(), tf.ITEMS[:3], 2)
    assert [(row["predicted"], row["log_probs"]) for row in rows] == [(None, {})] * 3
    assert mcq.score(rows)["unparsed"] == 3
    assert evaluation.dev_look(broken, tf.tokenizer(), tf.ITEMS[:3], 2)["loss"] == math.inf


def test_a_look_at_dev():
    scored = model()
    look = evaluation.dev_look(scored, tf.tokenizer(), tf.ITEMS, 4)
    rows = evaluation.score_letters(scored, tf.tokenizer(), tf.ITEMS, 4)
    right = sum(row["predicted"] == row["gold"] for row in rows)
    assert (look["correct"], look["total"], look["accuracy"]) == (right, 12, right / 12)
    assert look["loss"] == pytest.approx(-sum(row["log_probs"][row["gold"]] for row in rows) / 12)
    assert look["lower"] < look["accuracy"] < look["upper"]
    assert look["wrong"] == {row["id"]: row["predicted"] for row in rows if row["predicted"] != row["gold"]}
    assert len(look["wrong"]) == 12 - right > 0


def test_a_pass_holds_what_the_device_is_busy_with(monkeypatch):
    monkeypatch.setattr(evaluation, "PASS_TOKENS", {"cpu": 20, "cuda": 1000})
    rows = [[0] * n for n in (9, 3, 30, 5, 6, 7, 10)]
    cpu, card = torch.device("cpu"), torch.device("cuda")
    # shortest first; 3 x 6 and 2 x 9 tokens fit into 20, with their padding; a row that is longer stands alone
    assert list(evaluation._passes(rows, 4, cpu)) == [[1, 3, 4], [5, 0], [6], [2]]
    assert list(evaluation._passes(rows, 2, cpu)) == [[1, 3], [4, 5], [0, 6], [2]]
    assert list(evaluation._passes(rows, 4, card)) == [[1, 3, 4, 5], [0, 6, 2]]
    assert list(evaluation._passes([], 4, cpu)) == []


# models by name -----------------------------------------------------------------------------------------


def test_a_hub_id_a_base_and_what_is_none(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(base_model, "of_hub", lambda paths, hub_id: asked.append(hub_id) or tf.raw_folder())
    (found,) = evaluation.candidates(tf.paths(), ["google/gemma-3-1b-it"])
    assert (found.base, found.adapter, asked) == (tf.raw_folder(), None, ["google/gemma-3-1b-it"])
    (found,) = evaluation.candidates(tf.paths(), [str(tf.base_folder())])
    assert (found.base, found.adapter) == (tf.base_folder(), None) and len(asked) == 1
    with pytest.raises(PipelineError, match="an adapter without its base.*stage.json.* is missing") as error:
        evaluation.candidates(tf.paths(), [str(tf.adapter_folder()), str(tmp_path), "nosuch"])
    assert str(error.value).count("\n") == 2 and "nosuch: " in str(error.value)  # all of them at once
    with pytest.raises(PipelineError, match="has trained nothing yet"):
        evaluation.checkpoints_of(tf.paths())


def test_every_model_has_a_name_of_its_own(monkeypatch, tmp_path):
    paths = tf.paths()
    monkeypatch.setattr(evaluation, "run_folders", lambda paths: {"base": tf.raw_folder(), "02": tmp_path / "none"})
    one, two, other = (tmp_path / place for place in ("one/base", "two/base", "else/two/base"))
    for folder in (one, two, other, paths.models / "base", paths.models / "raw" / "base"):
        shutil.copytree(tf.raw_folder(), folder)
    asked = ["base", str(one), str(two), str(paths.models / "base"), str(paths.models / "raw" / "base"), str(two)]
    found = evaluation.candidates(paths, asked)
    names = ["base", "one--base", "two--base", f"{paths.models.name}--base", "raw-base"]
    assert [candidate.name for candidate in found] == names
    assert [candidate.base for candidate in found] == [tf.raw_folder(), *map(Path, asked[1:5])]
    with pytest.raises(
        PipelineError, match=f"^--models {other}: both it and .*two/base would be called two--base"
    ) as error:
        evaluation.candidates(paths, ["base", str(two), str(other), "nosuch"])
    assert "--models nosuch: no such model" in str(error.value)  # all of them at once


def test_checkpoints_are_the_training_s_own(monkeypatch, tmp_path):
    """Copies that a person put beside them are none, and take no step's place."""
    paths, folder = tf.paths(), tmp_path / "run" / "trained"
    link = evaluation.chain.Link("training", folder, tf.base_folder(), None, None, "")
    monkeypatch.setattr(evaluation.chain, "of_folder", lambda *_: link)
    for name in ("checkpoint-30", "checkpoint-9", "checkpoint-30-old", "checkpoint-backup", "checkpoint-", "final"):
        records.write_text(folder / name / "adapter_model.safetensors", name)
    (folder / "checkpoint-40").mkdir()  # without an adapter
    records.write_json(folder / "training_info.json", {"best_step": 30})
    found = evaluation.checkpoints_of(paths, str(folder))
    assert [(candidate.adapter.name, step) for candidate, step in found.values()] == [
        ("checkpoint-9", 9),
        ("checkpoint-30", 30),
    ]
    assert [name for name in found] == [candidate.name for candidate, _ in found.values()]
    records.write_json(folder / "training_info.json", {"best_step": 12})  # its checkpoint was not kept
    steps = {step: candidate.adapter.name for candidate, step in evaluation.checkpoints_of(paths, str(folder)).values()}
    assert list(steps.items()) == [(9, "checkpoint-9"), (12, "final"), (30, "checkpoint-30")]


# bits per character -------------------------------------------------------------------------------------


def nats(scored, ids, first=1):
    """Negative log-likelihood of ids[first:] given everything before, from the whole logits."""
    import torch

    log_probs = torch.log_softmax(tf.logits(scored, ids), dim=-1)
    return -sum(log_probs[i - 1, ids[i]].item() for i in range(first, len(ids)))


@pytest.mark.parametrize("precision", ["fp32", "8bit"])
def test_short_texts_are_scored_directly(precision):
    scored, texts = model(precision), [tf.KOREAN[0], tf.ENGLISH[0], "혈압"]
    total = sum(nats(scored, [2, *tokenizers.encode(tf.tokenizer(), text)]) for text in texts)
    expected = total / math.log(2) / sum(map(len, texts))
    assert evaluation.bits_per_character(scored, tf.tokenizer(), texts, 512, 1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("window", [2, 3, 8, 21, 32])
def test_long_texts_slide_and_every_token_counts_once(window):
    """A plain re-implementation: half a window at a time, each with up to half a window of context."""
    scored, text = model(), " ".join(tf.KOREAN[:5])
    ids = tokenizers.encode(tf.tokenizer(), text)
    total, counted, at = 0.0, [], 0
    while at < len(ids):
        begin = 0 if at == 0 else max(0, at - (window - 1 - window // 2))
        end = min(len(ids), begin + window - 1)
        assert end > at
        counted += range(at, end)
        total += nats(scored, [2, *ids[begin:end]], first=1 + at - begin)
        at = end
    assert counted == list(range(len(ids)))
    found = evaluation.bits_per_character(scored, tf.tokenizer(), [text], window, 4)
    assert found == pytest.approx(total / math.log(2) / len(text), rel=1e-5)


def test_windows_are_told_as_they_are_scored():
    ticks = []
    text = " ".join(tf.KOREAN)
    evaluation.bits_per_character(model(), tf.tokenizer(), [text], 32, 4, tick=lambda *at: ticks.append(at))
    total = len(evaluation._windows(tf.tokenizer(), [text], 32))
    assert ticks == [(i + 1, total) for i in range(total)] and total > 8


def test_batch_size_does_not_change_bits():
    scored, texts = model(), tf.texts(9, seed=6)
    values = [evaluation.bits_per_character(scored, tf.tokenizer(), texts, 32, batch) for batch in (1, 4, 64)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_more_context_gives_other_bits_and_bos_is_not_counted():
    scored = model()
    one = evaluation.bits_per_character(scored, tf.tokenizer(), ["혈압"], 64, 1)
    ids = tokenizers.encode(tf.tokenizer(), "혈압")
    assert one == pytest.approx(nats(scored, [2, *ids]) / math.log(2) / 2, rel=1e-5)


def test_completion_loss_counts_the_completion_only():
    from medgemma_korean.batches import exchange_row

    scored = model()
    rows = [exchange_row(tf.tokenizer(), prompts.dictionary(w), tf.KOREAN[i], 512) for i, w in enumerate(("가", "나"))]
    starts = [len(prompts.render(tf.tokenizer(), prompts.dictionary(w))[0]) for w in ("가", "나")]
    total = sum(nats(scored, row["input_ids"], start) for row, start in zip(rows, starts, strict=True))
    tokens = sum(len(row["input_ids"]) - start for row, start in zip(rows, starts, strict=True))
    for batch in (1, 2):
        found = evaluation.completion_loss(scored, rows, tf.tokenizer(), batch)
        assert found == pytest.approx(total / tokens, rel=1e-5)


# everything of one model --------------------------------------------------------------------------------


@pytest.fixture
def paths():
    """A run whose held-out texts and dev items are written."""
    found = tf.paths()
    records.write_jsonl(found.mcq / "dev.jsonl", tf.ITEMS)
    for folder, sources in ((found.plain_text, tf.KOREAN), (found.english_replay, tf.ENGLISH)):
        records.write_jsonl(folder / "validation.jsonl", [{"text": t} for t in tf.texts(20, 2, sources)])
    return found


def evaluated(scored, paths, which, precision="8bit"):
    return evaluation.evaluate(scored, tf.tokenizer(), paths, tf.profile(), which=which, precision=precision)


def test_evaluate(paths):
    scored = model("8bit")
    found = evaluated(scored, paths, "train_00")
    assert found == evaluated(scored, paths, "train_00") == records.read_back(found)
    assert found["mcq"]["n"] == 12 and len(found["predictions"]) == 12 and found["split"] == "dev"
    assert set(found["bits_per_character"]) == {"korean", "medical", "english"}
    texts = evaluation.held_out_texts(paths, tf.profile())
    for name, documents in texts.items():
        assert sum(map(len, documents)) >= 300 > sum(map(len, documents[:-1]))  # whole documents up to the limit
        bits = evaluation.bits_per_character(scored, tf.tokenizer(), documents, 32, 4)
        assert found["bits_per_character"][name] == bits
    assert texts["korean"] == tf.texts(20, 2, tf.KOREAN)[: len(texts["korean"])]
    asked = [sample["prompt"] for sample in found["samples"]]
    assert asked == evaluation.sample_prompts(paths) and "고혈압" in asked[0] and tf.ITEMS[0]["question"] in asked[2]
    assert [s["answer"] for s in found["samples"]] == [evaluation.generate(scored, tf.tokenizer(), p) for p in asked]
    line = evaluation.summary(found)
    assert f"dev {found['mcq']['accuracy']:.1%}" in line and f"{found['bits_per_character']['english']:.3f}" in line


def test_evaluate_refuses_a_broken_model_and_missing_text(paths):
    broken = model()
    next(p for n, p in broken.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(PipelineError, match="not finite"):
        evaluated(broken, paths, "broken")
    records.write_jsonl(paths.english_replay / "validation.jsonl", [])
    with pytest.raises(PipelineError, match="no held-out english text"):
        evaluated(broken, paths, "broken")
    records.write_jsonl(paths.mcq / "dev.jsonl", [])
    with pytest.raises(PipelineError, match="no dev questions"):
        evaluated(broken, paths, "broken")


def test_the_gate_opens_for_a_model_that_did_not_change(paths):
    base = modeling.load_base(tf.base_folder(), tf.profile(), "cpu")
    first = evaluated(base, paths, "base")
    fresh = modeling.fresh_adapter(base, tf.profile(), second=False, new_ids=tf.new_ids(), seed=1)
    after = evaluated(fresh, paths, "train_00")
    assert after["bits_per_character"] == first["bits_per_character"]
    gate = evaluation.gate(first, after, tf.profile())
    assert gate == {"passed": True, "reasons": [], "p": 1.0, "english_ratio": 1.0}


def test_the_gate_closes_for_shuffled_embeddings(paths):
    """A model that still runs and still answers, with its rows in another order: English must show it."""
    import torch

    first = evaluated(trained_on_english(), paths, "base", "fp32")
    broken = trained_on_english()
    weight = broken.get_input_embeddings().weight
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        weight.copy_(weight[order].clone())
    gate = evaluation.gate(first, evaluated(broken, paths, "train_00", "fp32"), tf.profile())
    assert not gate["passed"] and gate["english_ratio"] > 1.05
    assert any("English bits per character rose" in reason for reason in gate["reasons"])


def trained_on_english():
    """A base that has seen a little English: a random one has nothing to lose."""
    import torch

    modeling.set_up_torch(1)
    scored = tf.text_model(tf.base_folder()).requires_grad_(True)
    optimizer = torch.optim.AdamW(scored.parameters(), lr=5e-3)
    rows = [torch.tensor([[2, *tokenizers.encode(tf.tokenizer(), text)]]) for text in tf.ENGLISH]
    for ids in rows * 2:
        scored(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return scored.eval()


def by_hand(right, english=1.0, which="base", **changes):
    """An evaluation whose first `right` of 100 items are right."""
    golds = [random.Random(4).choice("ABCDE") for _ in range(100)]
    rows = [
        {"id": str(i), "exam": "doctor", "gold": g, "predicted": g if i < right else "ABCDE"["BCDEA".index(g)]}
        for i, g in enumerate(golds)
    ]
    rows = [{**row, "reason": "highest log-probability"} for row in rows]
    found = {"which": which, "precision": "8bit", "protocol": "letter", "split": "dev", "items": "x"}
    found |= {"mcq": mcq.score(rows), "predictions": rows}
    return {**found, "bits_per_character": {"korean": 1.0, "medical": 1.0, "english": english}, **changes}


@pytest.mark.parametrize(
    "right, english, passed",
    [
        (50, 1.0, True),
        (44, 1.0, True),  # 6 items lost: p = 0.031
        (42, 1.0, False),  # 8 items lost: p = 0.0078
        (90, 1.0, True),  # significantly better is no reason to stop
        (50, 1.05, True),
        (50, 1.051, False),
        (30, 2.0, False),
    ],
)
def test_the_gate_by_hand(right, english, passed):
    gate = evaluation.gate(by_hand(50), by_hand(right, english, "train_00"), tf.profile())
    assert gate["passed"] == passed and gate["english_ratio"] == english
    assert len(gate["reasons"]) == (right <= 42) + (english > 1.05)
    if right <= 42:
        assert "dev accuracy fell from 50.0% (base)" in gate["reasons"][0]


def test_the_gate_closes_when_nothing_can_be_compared():
    broken = by_hand(50, float("nan"), "train_00")
    assert not evaluation.gate(by_hand(50), broken, tf.profile())["passed"]


def test_compare_counts_and_refuses():
    change = evaluation.compare(by_hand(50), by_hand(43, which="train_00"))
    assert (change["wrong_to_right"], change["right_to_wrong"], change["before"]) == (0, 7, "base")
    assert change["p"] == 0.015625 and change["accuracy_change"] == pytest.approx(-0.07)
    for key, value, why in (
        ("items", "y", "other items"),
        ("precision", "bf16", "another precision"),
        ("protocol", "generate", "another protocol"),
    ):
        with pytest.raises(PipelineError, match=f"base and train_00 were scored with {why}"):
            evaluation.compare(by_hand(50), by_hand(50, which="train_00", **{key: value}))


def test_items_are_told_apart(paths):
    before = evaluated(model("8bit"), paths, "base")
    items = copy.deepcopy(tf.ITEMS)
    items[0]["question"] += "?"
    records.write_jsonl(paths.mcq / "dev.jsonl", items)
    with pytest.raises(PipelineError, match="other items"):
        evaluation.compare(before, evaluated(model("8bit"), paths, "train_00"))


@pytest.mark.parametrize("change", [{"question": "?"}, {"B": "another option"}, {"answer": "E"}, {"id": "x"}])
def test_every_part_of_an_item_counts(change):
    items = copy.deepcopy(tf.ITEMS)
    was = evaluation.items_digest(items)
    assert was == evaluation.items_digest([dict(item, reasoning="왜냐하면") for item in items])
    assert items[3] != items[3] | change
    items[3] |= change
    assert evaluation.items_digest(items) != was


def test_evaluations_of_other_texts_compare_nothing(paths):
    before = evaluated(model("8bit"), paths, "base")
    assert set(before["texts"]) == {"korean", "medical", "english"} and len(set(before["texts"].values())) == 3
    records.write_jsonl(paths.english_replay / "validation.jsonl", [{"text": "Another text of the fever. " * 20}])
    after = evaluated(model("8bit"), paths, "train_00")
    assert evaluation.other_texts(before, after) == ["english"] and not evaluation.other_items(before, after)
    for judge in (evaluation.compare, lambda *two: evaluation.gate(*two, tf.profile())):
        with pytest.raises(PipelineError, match=r"base and train_00 .* other held-out texts \(english\).*score both"):
            judge(before, after)
    longer = dataclasses.replace(tf.profile(), score_characters=500)  # another profile: more of the same documents
    texts = evaluation.text_digests(evaluation.held_out_texts(paths, longer))
    assert evaluation.other_texts(after, {"texts": texts}) == ["korean", "medical"]


def test_scores_of_other_data_are_found_before_training(paths):
    scores = evaluated(model("8bit"), paths, "base")
    old = {key: value for key, value in scores.items() if key != "texts"} | {"items": "an old digest"}
    evaluation.require_current(scores, paths, tf.profile(), "run: this")
    records.write_jsonl(paths.plain_text / "validation.jsonl", [{"text": "열이 납니다. " * 90}])
    records.write_jsonl(paths.mcq / "dev.jsonl", tf.ITEMS[::-1])
    with pytest.raises(PipelineError, match=r"base was scored on other .*\(korean\).*dev questions.*or run: this"):
        evaluation.require_current(scores, paths, tf.profile(), "run: this")
    evaluation.require_current(old, paths, tf.profile(), "run: this")  # of which nothing is known


def test_older_evaluations_are_compared_by_what_they_say():
    """Their digest was made of fewer parts of an item, and they do not name their texts."""
    texts = {"korean": "k", "medical": "m", "english": "e"}
    old, new = by_hand(50, items="old"), by_hand(43, which="train_00", items="new", texts=texts)
    assert evaluation.compare(old, new)["right_to_wrong"] == 7
    assert evaluation.gate(old, new, tf.profile())["passed"]
    new["predictions"][0]["gold"] = "E" if new["predictions"][0]["gold"] != "E" else "A"
    with pytest.raises(PipelineError, match="other items"):
        evaluation.compare(old, new)


# generation ---------------------------------------------------------------------------------------------


def teach(scored, prompt, completion):
    """Train until the completion is what the model says."""
    import torch

    ids, start = prompts.render(tf.tokenizer(), prompt, completion)
    labels = torch.tensor([[-100] * start + ids[start:]])
    optimizer = torch.optim.AdamW([p for p in scored.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(60):
        loss = scored(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss
        if loss < 0.05:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return scored


def test_generation_stops_at_the_end_of_the_turn():
    prompt = prompts.dictionary("고혈압")
    scored = teach(tf.trainable_model("fp32"), prompt, "혈압")
    assert evaluation.generate(scored, tf.tokenizer(), prompt) == "혈압<end_of_turn>"
    assert evaluation.generate(scored, tf.tokenizer(), prompt, most=1) != "혈압<end_of_turn>"
    # Greedy by step from the whole logits gives the same: no cache and no sampling setting in between.
    ids, _ = prompts.render(tf.tokenizer(), prompt)
    while not tf.tokenizer().decode(ids).endswith("혈압<end_of_turn>") and len(ids) < 60:
        ids = [*ids, tf.logits(scored, ids)[-1].argmax().item()]
    assert tf.tokenizer().decode(ids).endswith("model\n혈압<end_of_turn>")


# the gate on models that really are worse ---------------------------------------------------------------


def item_rows(letter):
    """(ids, labels) of the items, of which the answer's letter alone counts: letter(item) says which."""
    found = []
    for item in tf.ITEMS:
        ids, start = prompts.render(tf.tokenizer(), prompts.mcq_direct(item), letter(item))
        found.append((ids, [-100] * start + [ids[start]] + [-100] * (len(ids) - start - 1)))
    return found


def text_rows(texts):
    encoded = ([2, *tokenizers.encode(tf.tokenizer(), text)] for text in texts)
    return [(ids, ids) for ids in encoded]


def fit(scored, groups, steps, rate):
    """Train on the sum of the groups' mean losses, all rows of a group in one batch."""
    import torch

    def batch(rows):
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}

    inputs = [batch(rows) for rows in groups]
    optimizer = torch.optim.AdamW([p for p in scored.parameters() if p.requires_grad], lr=rate)
    scored.train()
    for _ in range(steps):
        sum(scored(**given, use_cache=False).loss for given in inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return scored.eval()


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """The folder of a base that knows its dev questions by heart and has read English: it has something to lose."""
    import shutil

    folder = tmp_path_factory.mktemp("knowing") / "base"
    modeling.set_up_torch(1)
    scored = tf.text_model(tf.base_folder()).requires_grad_(True)
    fit(scored, [text_rows(tf.ENGLISH)], 20, 5e-3)
    fit(scored, [item_rows(lambda item: item["answer"]), text_rows(tf.ENGLISH)], 60, 3e-3)
    shutil.copytree(tf.base_folder(), folder)
    modeling.save_model(scored, folder)
    return folder


def adapted(base):
    """The base with a fresh adapter, its weights trainable."""
    modeling.set_up_torch(2)
    return modeling.fresh_adapter(tf.text_model(base), tf.profile(), second=False, new_ids=tf.new_ids(), seed=1)


@pytest.fixture
def judged(knowing, paths):
    """judged(model) -> (its evaluation, the gate's word against the base that knows its questions)"""
    first = evaluated(tf.text_model(knowing), paths, "base", "fp32")
    assert first["mcq"]["correct"] == 12

    def judge(scored):
        after = evaluated(scored, paths, "train_00", "fp32")
        return after, evaluation.gate(first, after, tf.profile())

    return judge


def test_a_no_op_passes_the_gate(knowing, judged):
    after, gate = judged(adapted(knowing))
    assert gate == {"passed": True, "reasons": [], "p": 1.0, "english_ratio": 1.0} and after["mcq"]["correct"] == 12


def test_shuffled_embeddings_fail_both_ways(knowing, judged):
    import torch

    scored = tf.text_model(knowing)
    weight = scored.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(3))].clone())
    after, gate = judged(scored)
    assert not gate["passed"] and gate["p"] < 0.01 and gate["english_ratio"] > 1.05 and len(gate["reasons"]) == 2
    assert after["mcq"]["correct"] <= 4


def test_an_adapter_trained_on_wrong_answers_fails(knowing, judged):
    """English is trained too, and stays: the answers alone must stop it."""
    wrong = {"A": "B", "B": "C", "C": "D", "D": "A"}
    english = text_rows(tf.texts(20, 2, tf.ENGLISH))
    scored = fit(adapted(knowing), [item_rows(lambda item: wrong[item["answer"]]), english], 60, 5e-3)
    after, gate = judged(scored)
    assert after["mcq"]["correct"] <= 4 and gate["english_ratio"] < 1.05
    assert not gate["passed"] and len(gate["reasons"]) == 1 and "dev accuracy fell from 100.0%" in gate["reasons"][0]


def test_an_adapter_that_destroyed_english_fails(knowing, judged):
    """Its answers stay right: English alone must stop it."""
    shuffled = [
        " ".join(random.Random(i).sample(text.split(), len(text.split()))[::-1]) for i, text in enumerate(tf.KOREAN)
    ]
    scored = fit(adapted(knowing), [item_rows(lambda item: item["answer"]), text_rows(shuffled)], 40, 1e-2)
    after, gate = judged(scored)
    assert after["mcq"]["correct"] == 12 and gate["p"] == 1
    assert not gate["passed"] and len(gate["reasons"]) == 1 and "English bits per character rose" in gate["reasons"][0]


# other ways to ask --------------------------------------------------------------------------------------


def test_rotations_ask_the_rotated_items():
    scored = model()
    answer = functools.partial(evaluation.score_letters, scored, tf.tokenizer(), batch=4)
    rows, scores = evaluation.rotate(answer, tf.ITEMS, 5)
    assert [{k: v for k, v in row.items() if k != "rotations"} for row in rows] == answer(tf.ITEMS)
    shown = Counter()
    for shift in range(5):
        asked = [(item, row) for item, row in zip(tf.ITEMS, rows, strict=True) if shift < 4 or "E" in item]
        turned = answer([mcq.rotated(item, shift) for item, _ in asked])
        shown.update(at_shift["predicted"] for at_shift in turned)
        for (item, row), at_shift in zip(asked, turned, strict=True):
            chosen = row["rotations"][shift]
            assert item[chosen] == mcq.rotated(item, shift)[at_shift["predicted"]]
        right = sum(row["predicted"] == row["gold"] for row in turned)
        assert scores["accuracies"][shift] == pytest.approx(right / len(asked))
    four = [row for item, row in zip(tf.ITEMS, rows, strict=True) if "E" not in item]
    assert four and {len(row["rotations"]) for row in four} == {4}  # the fifth would be the first again
    means = [sum(option == row["gold"] for option in row["rotations"]) / len(row["rotations"]) for row in rows]
    assert scores["n"] == 5 and scores["mean_accuracy"] == pytest.approx(sum(means) / 12)
    assert scores["shown"] == {letter: shown[letter] for letter in "ABCDE"}
    assert sum(scores["shown"].values()) == 60 - len(four) and scores["unparsed"] == 0
    only, of_four = evaluation.rotate(answer, [item for item in tf.ITEMS if "E" not in item], 5)
    assert of_four["n"] == 4 and [row["rotations"] for row in only] == [row["rotations"] for row in four]
    once, alone = evaluation.rotate(answer, tf.ITEMS, 1)
    assert alone["consistency"] == 1 and alone["vote_accuracy"] == alone["mean_accuracy"]
    assert [row["rotations"] for row in once] == [[row["predicted"]] for row in rows]


def test_generated_answers_are_those_of_one_by_one_and_stop_at_the_turn():
    """Taught to answer with the letter, batches padded on the left say what each item says alone."""
    modeling.set_up_torch(4)
    scored = tf.text_model(tf.base_folder()).requires_grad_(True)
    rows = []
    for item in tf.ITEMS:
        ids, start = prompts.render(tf.tokenizer(), prompts.mcq_direct(item), item["answer"])
        rows.append((ids, [-100] * start + ids[start:]))
    fit(scored, [rows], 80, 5e-3)
    found = evaluation.generate_letters(scored, tf.tokenizer(), tf.ITEMS, 5, most=8)
    for item, row in zip(tf.ITEMS, found, strict=True):
        assert row["output"] == evaluation.generate(scored, tf.tokenizer(), prompts.mcq_direct(item), most=8)
    ended = [row for row in found if row["ended"]]
    assert len(ended) >= 10 and all(row["output"].endswith("<end_of_turn>") for row in ended)
    assert sum(row["predicted"] == row["gold"] for row in found) >= 10
    cut = evaluation.generate_letters(scored, tf.tokenizer(), tf.ITEMS, 5, most=1)
    assert not any(row["ended"] for row in cut) and [r["predicted"] for r in cut] == [r["predicted"] for r in found]


def test_reasoning_is_asked_for_and_scored(monkeypatch):
    scored, asked = model(), []
    real = prompts.mcq_reasoning
    monkeypatch.setattr(prompts, "mcq_reasoning", lambda item: asked.append(item["id"]) or real(item))
    rows = evaluation.generate_letters(scored, tf.tokenizer(), tf.ITEMS[:3], 2, most=4, reasoning=True)
    assert asked == [item["id"] for item in tf.ITEMS[:3]]
    for item, row in zip(tf.ITEMS, rows, strict=False):
        assert row["output"] == evaluation.generate(scored, tf.tokenizer(), real(item), most=4)
        assert row["format"] == mcq.format_score(row["output"])
        assert row["combined"] == mcq.combined_score(row["output"], item["answer"], item)


def test_an_empty_generation_is_a_counted_row():
    """A model that ends its turn at once."""
    import torch

    scored = tf.text_model(tf.base_folder())
    end = tf.tokenizer().convert_tokens_to_ids("<end_of_turn>")

    def at_once(ids, scores):
        return torch.full_like(scores, -100.0).index_fill(1, torch.tensor([end]), 0.0)

    real = scored.generate
    scored.generate = lambda **given: real(**given, logits_processor=[at_once])
    rows = evaluation.generate_letters(scored, tf.tokenizer(), tf.ITEMS[:4], 2, most=4)
    assert [(r["predicted"], r["reason"], r["output"], r["ended"]) for r in rows] == [
        (None, mcq.EMPTY, "<end_of_turn>", True)
    ] * 4
    assert mcq.score(rows)["unparsed_reasons"] == {mcq.EMPTY: 4}


def test_letters_in_eight_bits_beside_full_precision():
    """Measured and shown, not asserted to be equal: quantising changes scores, and on random weights some letters."""
    full, eight = (
        evaluation.score_letters(model(precision), tf.tokenizer(), tf.ITEMS, 4) for precision in ("fp32", "8bit")
    )
    same = sum(a["predicted"] == b["predicted"] for a, b in zip(full, eight, strict=True))
    apart = max(
        abs(a["log_probs"][k] - b["log_probs"][k]) for a, b in zip(full, eight, strict=True) for k in a["log_probs"]
    )
    print(f"8bit beside fp32: {same} of {len(full)} letters equal, log-probabilities at most {apart:.3f} apart")
    assert same >= 9 and 0 < apart < 0.5
    # Within eight bits, batches change nothing but rounding: activations are quantised row by row.
    alone = evaluation.score_letters(model("8bit"), tf.tokenizer(), tf.ITEMS, 1)
    assert sum(a["predicted"] == b["predicted"] for a, b in zip(alone, eight, strict=True)) >= 11

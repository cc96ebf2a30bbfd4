"""Letter scores and bits per character against direct computations, and a gate that must open and close."""

import copy
import math
import random

import pytest
import torch_fixtures as tf

from medgemma_korean import evaluation, mcq, modeling, prompts, records
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

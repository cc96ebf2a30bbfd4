"""Exam items in what training reads, source by source, by the one definition; clean and touched items apart."""

import pytest
import torch_fixtures as tf

from medgemma_korean import contamination, mcq, prompts, records
from medgemma_korean.statistics import wilson

WORDS = iter(tf.random_korean(200, seed=8))
ITEMS = [
    {**item, "question": next(WORDS), **{k: next(WORDS)[:15] for k in prompts.letters_of(item)}}
    for item in tf.ITEMS[:9]
]
OTHER = "벚꽃이 피는 봄에는 사람들이 강가를 걷고 아이들은 공원에서 논다."


def printed(item):
    return f"{item['question']}\n{prompts.options(item)}"


@pytest.fixture
def paths():
    """A run with every training source, each with one other item in it, and none in the plain text."""
    found = tf.paths()
    for folder in (found.plain_text, found.english_replay):
        records.write_jsonl(folder / "train.jsonl", [{"text": OTHER}])
    records.write_jsonl(
        found.english_replay / "train.jsonl", [{"text": OTHER}, {"text": f"{OTHER} {printed(ITEMS[0])}"}]
    )
    records.write_json(found.dictionary, [{"term": ITEMS[1]["question"], "definition": prompts.options(ITEMS[1])}] * 2)
    records.write_json(found.characters, [{"term": "↑", "definition": "increased", "count": 3}])
    pair = {"source": OTHER, "target": printed(ITEMS[2]), "direction": "en_to_ko", "origin": "x"}
    records.write_jsonl(found.pairs / "en_to_ko.jsonl", [pair])
    records.write_jsonl(found.pairs / "ko_to_en.jsonl", [{**pair, "target": OTHER}])
    turned = mcq.rotated(ITEMS[3], 2)  # the same question with its options in another order
    records.write_jsonl(found.mcq / "train.jsonl", [turned, {**turned, "question": OTHER}])
    records.write_jsonl(
        found.mcq / "train_with_reasoning.jsonl", [{**turned, "question": OTHER, "reasoning": printed(ITEMS[4])}]
    )
    return found


def test_every_source_is_searched(paths):
    ledger = contamination.ledger(paths, "dev", ITEMS, built=False)
    sources = {name: (found["rows"], found["touched"]) for name, found in ledger["sources"].items()}
    assert sources == {
        "plain text": (1, []),
        "English replay": (2, [ITEMS[0]["id"]]),
        "dictionary": (2, [ITEMS[1]["id"]]),
        "symbols": (1, []),
        "en to ko": (1, [ITEMS[2]["id"]]),
        "ko to en": (1, []),
        "exam questions": (2, [ITEMS[3]["id"]]),
        "exam rationales": (1, [ITEMS[4]["id"]]),
    }
    assert ledger["touched"] == sorted(item["id"] for item in ITEMS[:5]) and ledger["checked"] == len(ITEMS)


def test_a_built_model_was_pre_trained_on_text_too(paths):
    names = [source.name for source in contamination.sources_of(paths, built=True)]
    assert "pre-training ko/part-1" in names and "pre-training en/part-1" in names
    assert not any(source.name.startswith("pre-") for source in contamination.sources_of(paths, built=False))


def test_the_ledger_is_kept_until_something_changes(paths, monkeypatch):
    searched = []
    real = contamination._search
    monkeypatch.setattr(contamination, "_search", lambda *given: searched.append(given) or real(*given))
    first = contamination.ledger(paths, "dev", ITEMS, built=False)
    assert contamination.ledger(paths, "dev", ITEMS, built=False) == first and len(searched) == 1
    records.write_jsonl(paths.plain_text / "train.jsonl", [{"text": printed(ITEMS[6])}])
    assert ITEMS[6]["id"] in contamination.ledger(paths, "dev", ITEMS, built=False)["touched"]
    contamination.ledger(paths, "dev", ITEMS[:-1], built=False)
    contamination.ledger(paths, "test", ITEMS, built=False)
    assert len(searched) == 4


def test_sources_that_are_not_there_are_left_out():
    assert contamination.sources_of(tf.paths(), built=False) == []
    ledger = contamination.ledger(tf.paths(), "dev", ITEMS, built=False)
    assert ledger["sources"] == {} and ledger["touched"] == []


def test_accuracies_of_clean_and_touched_items():
    rows = [{"id": str(i), "gold": "A", "predicted": "A" if i < 4 else None} for i in range(10)]
    found = contamination.accuracies(rows, ["0", "1", "9", "no item of this part"])
    lower, upper = wilson(2, 7)
    assert found["clean"] == {"n": 7, "correct": 2, "accuracy": 2 / 7, "lower": lower, "upper": upper}
    assert (found["touched"]["n"], found["touched"]["correct"]) == (3, 2)
    assert contamination.accuracies(rows, []) == {
        "clean": {"n": 10, "correct": 4, "accuracy": 0.4, "lower": wilson(4, 10)[0], "upper": wilson(4, 10)[1]},
        "touched": None,
    }

"""What each train program lays out from the refined sample: exactly which text is supervised, and what is masked."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch_fixtures as tf

from medgemma_korean import batches, inspection, profiles, prompts, trained
from medgemma_korean.batches import MASKED
from medgemma_korean.cli import PipelineError
from medgemma_korean.paths import RunPaths

PROGRAMS = {
    "00": ("train_00_plain_text", lambda profile: profile.plain_text),
    "01": ("train_01_medical_dict", lambda profile: profile.dictionary),
    "02": ("train_02_kor_med_test", lambda profile: profile.mcq),
}
USER, MODEL, END = "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n⟧"
LONG = 4096  # tokens: the tests' tokenizer cuts the sample into many


@pytest.fixture
def lay_out(refined_root, load_program, monkeypatch):
    """lay_out(stage, **settings) -> (plan, context), by the stage's own program on the refined sample."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(refined_root))
    paths, profile = RunPaths.of("tiny", "data/sample"), profiles.MODELS["tiny"]

    def lay_out(stage, *, program=None, max_samples=None, max_characters=None, **changes):
        name, settings = PROGRAMS[stage]
        args = SimpleNamespace(seed=17, max_samples=max_samples, max_characters=max_characters, eval_samples=None)
        settings = replace(settings(profile), **{"max_length": LONG, "max_rows": None, **changes})
        context = trained.Context(args, profile, paths, settings, tf.tokenizer(), None, {})
        return (program or load_program(name)).build(context), context

    lay_out.paths = paths
    return lay_out


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def documents(plan):
    """(marked text, ids, labels) of every document of the plan, as the trainer's own collator hands them over."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = tf.tokenizer()
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    batch = collate(list(batches.dataset(plan.rows)))
    for ids, labels in inspection.documents(batch):
        text = inspection.painted(tokenizer, inspection.segments(ids, labels, tokenizer.pad_token_id))
        yield text, ids, labels


def assert_invariants(plan):
    """What holds for every document of every stage, whatever it says."""
    tokenizer = tf.tokenizer()
    bos, pad, end = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")
    newline = tokenizer.convert_tokens_to_ids("\n")
    for text, ids, labels in documents(plan):
        assert ids[0] == bos and ids.count(bos) == 1 and labels[0] == MASKED, text
        assert pad not in ids and pad not in labels, text
        assert all(label in (MASKED, token) for token, label in zip(ids, labels, strict=True)), text
        if "<start_of_turn>" in text:
            assert labels[-2:] == [end, newline] and labels.count(end) == 1, text
            start = next(i for i, label in enumerate(labels) if label != MASKED)
            user = text.removeprefix(USER).partition(MODEL)[0]
            assert prompts.render(tokenizer, user)[0] == ids[:start], text  # what evaluation asks
        else:
            assert labels[1:] == ids[1:], text
    assert inspection.problems_of(plan, tokenizer, len(tokenizer)) == []


# stage 00 -----------------------------------------------------------------------------------------------


def test_plain_text_is_supervised_whole_and_once(lay_out):
    plan, context = lay_out("00", max_length=4000, replay_rows_only=0.2, replay=0.2)
    assert_invariants(plan)
    found = Counter(text for text, *_ in documents(plan))
    texts = {
        folder: [row["text"] for row in rows_of(folder / "train.jsonl")]
        for folder in (lay_out.paths.plain_text, lay_out.paths.english_replay)
    }
    korean, english = ([f"<bos>⟦{text}<eos>⟧" for text in found] for found in texts.values())
    epochs = context.settings.epochs
    assert {found[text] for text in korean} == {epochs} and len(korean) == context.counts["00_plain_text"] > 50
    assert set(found) <= {*korean, *english} and set(found) & set(english)
    assert context.counts["korean_characters"] == epochs * sum(map(len, texts[lay_out.paths.plain_text]))


def test_long_texts_are_packed_without_loss(lay_out):
    plan, context = lay_out("00", max_length=128, epochs=1, replay=0.0, replay_rows_only=0.0)
    assert_invariants(plan)
    assert max(len(row["input_ids"]) for row in plan.rows) == 128
    tokenizer = tf.tokenizer()
    found = Counter(tuple(ids[1:]) for _, ids, _ in documents(plan))
    expected = Counter()
    for row in rows_of(lay_out.paths.plain_text / "train.jsonl"):
        ids = tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        parts = [tuple(ids[i : i + 126]) for i in range(0, len(ids) - 1, 126)]
        if len(ids) % 126 == 1:  # <eos> goes with the last full part, for which there is room
            parts[-1] += tuple(ids[-1:])
        expected.update(parts)
    assert found == expected


def test_a_number_of_characters_is_the_same_text_for_any_length(lay_out):
    told = set()
    for length in (512, LONG):
        plan, context = lay_out("00", max_characters=9000, max_length=length, epochs=1, replay=0, replay_rows_only=0)
        assert context.counts["korean_characters"] == 9000
        told.add(tuple(sorted(i for _, ids, _ in documents(plan) for i in ids if i > 2)))
        assert_invariants(plan)
    assert len(told) == 1
    with pytest.raises(PipelineError, match="--max-characters 900000000: there are [0-9,]+ characters of Korean"):
        lay_out("00", max_characters=900_000_000)


def test_chosen_characters_come_in_a_seeded_order_and_the_last_is_cut(load_program):
    program, texts = load_program("train_00_plain_text"), [f"{n:02}" + "가" * n for n in range(30)]
    for most in (1, 7, 200, sum(map(len, texts))):
        found = list(program.first_characters(lambda: iter(texts), most, 5))
        assert sum(map(len, found)) == most and found == list(program.first_characters(lambda: texts, most, 5))
        assert all(any(text.startswith(part) for text in texts) for part in found)
        assert all(part in texts for part in found[:-1]) and len(set(found)) == len(found)
    assert found != list(program.first_characters(lambda: texts, most, 6)) and found != texts


def test_the_number_of_samples_is_that_of_documents(lay_out):
    plan, context = lay_out("00", max_samples=20, epochs=1, replay=0, replay_rows_only=0)
    assert context.counts["00_plain_text"] == 20 == sum(1 for _ in documents(plan))


# stage 01 -----------------------------------------------------------------------------------------------


def test_exchanges_of_stage_01(lay_out):
    plan, context = lay_out("01", epochs=1)
    assert_invariants(plan)
    paths = lay_out.paths
    dictionary = json.loads(paths.dictionary.read_text(encoding="utf-8"))
    symbols = json.loads(paths.characters.read_text(encoding="utf-8"))
    asked = [(f"Meaning of word {row['term']}:", row["definition"]) for row in dictionary + symbols]
    definitions = Counter(row["definition"] for row in dictionary)
    asked += [
        (f"다음 뜻에 맞는 의학 용어: {row['definition']}", row["term"])
        for row in dictionary if definitions[row["definition"]] == 1
    ]  # fmt: skip
    for row in rows_of(paths.pairs / "en_to_ko.jsonl"):
        asked.append((f"다음 영어 문장을 한국어로 번역하세요.\n\n{row['source']}", row["target"]))
        asked.append((f"Translate the following Korean sentence into English.\n\n{row['target']}", row["source"]))
    expected = Counter(f"{USER}{prompt}{MODEL}⟦{completion}{END}" for prompt, completion in asked)
    found = Counter(text for text, *_ in documents(plan) if text.startswith(USER))
    assert found.keys() <= expected.keys() and all(found[text] <= expected[text] for text in found)
    assert found.total() + context.counts["held_out"] == context.counts["terms"] + context.counts["reverse"] + (
        context.counts["symbols"] + 2 * context.counts["pairs"]
    )
    for kind in ("Meaning of word ", "다음 뜻에 ", "다음 영어 ", "Translate "):
        assert any(text.startswith(USER + kind) for text in found), kind
    replayed = {text for text, *_ in documents(plan) if not text.startswith(USER)}
    texts = [r["text"] for f in (paths.plain_text, paths.english_replay) for r in rows_of(f / "train.jsonl")]
    assert replayed and replayed <= {f"<bos>⟦{text}<eos>⟧" for text in texts}


# stage 02 -----------------------------------------------------------------------------------------------

EXAM = re.compile(
    re.escape(USER)
    + r"(?:정답 알파벳만 답하세요 \((?P<named>[A-E, ]+) 중 하나\)\.|Reasoning 후 정답 알파벳 하나만 답하세요\.)\n\n"
    + r"(?P<detail>```format\n.*\n```\n\n```example\n.*\n```\n\n)?"
    + r"(?P<question>.*)\nA\) (?P<A>.+)\nB\) (?P<B>.+)\nC\) (?P<C>.+)\nD\) (?P<D>[^\n]+)(?:\nE\) (?P<E>[^\n]+))?"
    + re.escape(MODEL)
    + r"⟦(?P<completion>.*)"
    + re.escape(END),
    re.DOTALL,
)


def exams(lay_out, plan):
    """(form, match, item, item as it is shown) of each exam row; asserts that all of them follow the template."""
    items = rows_of(lay_out.paths.mcq / "train.jsonl")
    for text, *_ in documents(plan):
        if "정답 알파벳" not in text.partition("\n\n")[0]:
            continue
        match = EXAM.fullmatch(text)
        assert match, text
        shown = {letter: match[letter] for letter in "ABCDE" if match[letter]}
        tail = match["question"].removeprefix("…")
        (item,) = (
            item for item in items
            if item["question"].endswith(tail) and {item[k] for k in prompts.letters_of(item)} == set(shown.values())
        )  # fmt: skip
        assert match["question"] == item["question"] or (match["question"][0] == "…" and len(tail) >= 20)
        old = prompts.letters_of(item)
        order = [next(i for i, letter in enumerate(old) if item[letter] == text) for text in shown.values()]
        form = "direct" if match["named"] else "detailed" if match["detail"] else "simple"
        yield form, match, item, prompts.shuffled(item, order)


@pytest.mark.parametrize("detailed", [0.0, 1.0], ids=["simple", "detailed"])
def test_exam_rows_of_stage_02(lay_out, load_program, monkeypatch, detailed):
    program = load_program("train_02_kor_med_test")
    monkeypatch.setattr(program, "DETAILED", detailed)
    plan, context = lay_out("02", program=program, epochs=2)
    assert_invariants(plan)
    seen, letters = Counter(), Counter()
    for form, match, item, shown in exams(lay_out, plan):
        seen[form, item["id"]] += 1
        # The right option is the one that was right before its letter changed.
        assert shown[shown["answer"]] == item[item["answer"]] and match["question"] == item["question"]
        if form == "direct":
            assert match["named"] == ", ".join(prompts.letters_of(item)) and match["completion"] == shown["answer"]
            letters[match["completion"]] += 1
        else:
            assert match["completion"] == f"<reasoning>\n{shown['reasoning'].strip()}\n</reasoning>{shown['answer']}"
        if form == "detailed":
            example = match["detail"].partition("```example\n")[2]
            assert "\n".join(prompts.REASONING_STEPS) in match["detail"] and item["question"] not in example
            assert re.search(
                r"\nA\) .+\nB\) .+\nC\) .+\nD\) .+\n.*<reasoning>\n.*\n</reasoning>[A-E]\n```", example, re.S
            )
    items = rows_of(lay_out.paths.mcq / "train.jsonl")
    reasoned = {item["id"] for item in items if item.get("reasoning")}
    form = "detailed" if detailed else "simple"
    assert seen == Counter({("direct", item["id"]): 2 for item in items} | {(form, name): 2 for name in reasoned})
    assert context.counts[form] == 2 * len(reasoned) > 0 and len(letters) == 5 and context.counts["items"] == len(items)


def test_truncation_takes_the_question_and_leaves_options_and_answer(lay_out, monkeypatch):
    plan, context = lay_out("02", epochs=1)
    lengths = sorted(len(row["input_ids"]) for row in plan.rows)
    cut = lengths[len(lengths) * 3 // 4]
    monkeypatch.setattr(batches, "MAX_DROPPED", 1.0)
    plan, context = lay_out("02", epochs=1, max_length=cut)
    assert context.counts["shortened"] > 5 and max(len(row["input_ids"]) for row in plan.rows) <= cut
    assert_invariants(plan)
    shortened = 0
    for form, match, item, shown in exams(lay_out, plan):
        assert shown[shown["answer"]] == item[item["answer"]]
        assert {match[letter] for letter in prompts.letters_of(item)} == {item[k] for k in prompts.letters_of(item)}
        answer = match["completion"].rpartition("</reasoning>")[2]
        assert answer == shown["answer"] and (form == "direct") == (answer == match["completion"])
        shortened += match["question"] != item["question"]
    assert shortened == context.counts["shortened"]


def test_an_epoch_shows_the_options_in_another_order(lay_out):
    plan, _ = lay_out("02", epochs=3)
    orders: dict[str, set] = {}
    for form, match, item, _ in exams(lay_out, plan):
        if form == "direct":
            orders.setdefault(item["id"], set()).add(tuple(match[letter] for letter in "ABCDE"))
    assert sum(len(found) == 3 for found in orders.values()) > 0.9 * len(orders)


# files of another stage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, file, given, said",
    [
        ("00", "00_plain_text/train.jsonl", {"term": "가", "definition": "나"}, "line 1: no text under text"),
        ("00", "00_english_replay/train.jsonl", {"text": None}, "line 1: no text under text; the row has text"),
        ("00", "00_plain_text/train.jsonl", None, "00_plain_text/train.jsonl: no text to train on"),
        ("01", "01_medical_dict.json", [{"term": "가", "definition": "나"}, {"text": "다"}],
         "row 2: no text under term, definition; the row has text"),
        ("01", "02_char_dict.json", {"↑": "increased"}, "expected a JSON list of objects"),
        ("01", "01_english_korean/en_to_ko.jsonl", {"en": "a", "ko": "가"}, "line 1: no text under source, target"),
        ("01", "00_plain_text/train.jsonl", None, "00_plain_text/train.jsonl: no text to replay"),
        ("02", "02_kor_med_test/train.jsonl", {"term": "가", "definition": "나"},
         "line 1: no text under question, A, B, C, D, answer; the row has term, definition"),
        ("02", "02_kor_med_test/train.jsonl", {**tf.ITEMS[0], "answer": "E"}, "row 1: answer 'E' is none of ABCD"),
        ("02", "02_kor_med_test/dev.jsonl", {k: v for k, v in tf.ITEMS[1].items() if k != "id"},
         "line 1: no text under id"),
        ("02", "01_medical_dict.json", [{"question": "가"}], "row 1: no text under term, definition"),
    ],
)  # fmt: skip
def test_a_file_of_another_stage_is_one_clear_error(lay_out, tmp_path, monkeypatch, stage, file, given, said):
    shutil.copytree(lay_out.paths.refined, tmp_path / "refined")
    lines = "" if given is None else json.dumps(given, ensure_ascii=False) + "\n"
    (tmp_path / "refined" / file).write_text(lines, encoding="utf-8")
    monkeypatch.setattr(RunPaths, "refined", tmp_path / "refined")
    with pytest.raises(PipelineError) as error:
        lay_out(stage)
    assert said in str(error.value) and file.rpartition("/")[2] in str(error.value) and error.value.exit_code == 2
    assert "\n" not in str(error.value)

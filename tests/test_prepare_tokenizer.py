"""prepare_tokenizer on small data of its own: what counts for what, the verdict both ways, and every bad input."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch_fixtures as tf

from medgemma_korean import profiles, records, verdict
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError

SYLLABLES = "고혈압뇌졸중심근경색당뇨병환자폐렴기침발열호흡곤란응급질간호활력징후약물상부작용치과충염만성신전"
PARTICLES = [*"은는이가을를에의로와도만", "", "", ""]
STEMS = ["".join(random.Random(i).sample(SYLLABLES, 2)) for i in range(60)]


def made_texts(number, seed):
    """Lines of made words, each a stem and mostly a particle; no two lines are equal."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(STEMS) + rng.choice(PARTICLES) for _ in range(12)) for _ in range(number)]


def item(number, question):
    about = {"id": f"doctor-2020-1-{number}", "exam": "doctor", "question": question, "answer": "A"}
    return about | dict(zip("ABCDE", made_texts(1, number)[0].split(), strict=False))


@pytest.fixture
def program(load_program):
    return load_program("prepare_tokenizer")


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A run with refined data, and a base that has seen no Korean word, its syllables only: extension must help it."""
    monkeypatch.setenv("MEDGEMMA_KOREAN_ROOT", str(tmp_path))
    found = tf.paths()
    found.refined.mkdir(parents=True)
    write(found, "00_plain_text/train", [{"text": text} for text in made_texts(600, 1)])
    write(found, "00_plain_text/validation", [{"text": text} for text in made_texts(30, 2)])
    write(found, "00_english_replay/validation", [{"text": text} for text in tf.ENGLISH])
    write(found, "02_kor_med_test/train", [item(i, text) for i, text in enumerate(made_texts(40, 3))])
    write(found, "02_kor_med_test/dev", [item(i, text) for i, text in enumerate(made_texts(20, 4))])
    for made in ("refine_00_plain_text", "refine_02_kor_med_test"):
        complete(found.record(made), made)
    set_base(found, [" ".join(SYLLABLES + "".join(PARTICLES))] * 50 + [*tf.ENGLISH], 480)
    return found


def write(paths, name, rows):
    records.write_jsonl(paths.refined / f"{name}.jsonl", rows)


def complete(record, name):
    records.write_json(record, {"program": name, "fingerprint": "f", "home": ".", "outputs": {}, "gate": None})


def set_base(paths, texts, vocab):
    shutil.rmtree(paths.raw_model, ignore_errors=True)
    tokenizers.build_base(paths.raw_model, texts, vocab)
    shape = tf.shape(tokenizers.rows_for(vocab + 1) + 64)
    records.write_json(paths.raw_model / "config.json", {"text_config": shape})
    complete(paths.raw_model / "stage.json", "download_model")


def info(paths):
    return records.read_json(paths.tokenizer / "tokenizer_info.json")


# the whole program --------------------------------------------------------------------------------------


def test_writes_a_tokenizer_with_its_verdict(program, paths, capsys):
    assert program.main(["--new-tokens", "100"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("EXTEND: compression, medical: ")
    found, folder = info(paths), paths.tokenizer
    assert found["verdict"] == "extend" and found["base_vocab"] == 481
    assert found["vocab"] == 481 + found["new_tokens"] == len(tokenizers.load(folder))
    assert found["rows"] == tokenizers.rows_for(found["vocab"], at_least=576) == found["memory"]["rows"]
    assert 0 == found["new_syllables"] < found["new_tokens"] <= 100
    assert found["hashes"]["base"] == tokenizers.fingerprint(paths.raw_model)
    assert found["hashes"]["tokenizer"] == tokenizers.fingerprint(folder) != found["hashes"]["base"]
    assert len(found["hashes"]["corpus"]) == 64
    before, after = found["tokens_per_character"]["base"], found["tokens_per_character"]["extended"]
    assert after["medical"] < 0.87 * before["medical"] and after["english"] == before["english"]
    lines = [verdict.Line(**line) for line in found["lines"]]
    assert verdict.decide(lines) == (found["verdict"], found["reason"])
    names = [line.name for line in lines]
    assert names == [
        "compression, korean",
        "compression, medical",
        "compression, english",
        "use",
        "updates",
        "memory",
        "invariants",
        "init gate",
        "provenance",
    ]
    pieces = (folder / "new_tokens.txt").read_text(encoding="utf-8").split()
    assert tokenizers.load(folder).convert_tokens_to_ids(pieces) == list(range(481, found["vocab"]))
    assert (folder / "tokenizer.model").is_file() and (folder / "chat_template.jinja").is_file()
    assert program.main(["--new-tokens", "100"]) == 0
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(PipelineError, match="min_count: 4 -> 50"):
        program.main(["--new-tokens", "100", "--min-count", "50"])


def test_the_verdict_flips_with_the_data(program, paths, capsys):
    """A base that learned from the same Korean text has nothing to gain; --new-tokens auto obeys."""
    assert program.main(["--new-tokens", "auto", "--name", "english"]) == 0
    english = records.read_json(paths.models / "tokenizer" / "english" / "tokenizer_info.json")
    assert english["verdict"] == "extend" and english["new_tokens"] == english["tried"] > 100
    capsys.readouterr()
    set_base(paths, [*made_texts(600, 1), *tf.ENGLISH], 1100)
    assert program.main(["--new-tokens", "auto"]) == 0
    told, korean = capsys.readouterr().out, info(paths)
    assert told.startswith("DO NOT EXTEND: compression, medical: ") and "the base vocabulary is kept" in told
    assert korean["verdict"] == "do not extend" and "compression, medical" in korean["reason"]
    assert korean["new_tokens"] == 0 < korean["tried"]
    assert tokenizers.load(paths.tokenizer).get_vocab() == tokenizers.load(paths.raw_model).get_vocab()
    assert korean["hashes"]["tokenizer"] == tokenizers.fingerprint(paths.tokenizer)
    # A number is a person's choice: it is obeyed, with a warning in the record.
    assert program.main(["--new-tokens", "50", "--name", "asked"]) == 0
    record = records.read_json(paths.models / "tokenizer" / "asked" / "stage.json")
    assert record["counts"]["new_tokens"] > 0 and "do not extend" in record["warnings"][0]


def test_no_new_tokens_goes_through_the_same_code(program, paths, capsys):
    assert program.main(["--new-tokens", "0"]) == 0
    assert capsys.readouterr().out.startswith("DO NOT EXTEND: new tokens: none were asked for")
    found = info(paths)
    assert (found["new_tokens"], found["vocab"], found["rows"]) == (0, 481, 576)
    assert found["updates"] == {"minimum": 0.0, "5th_percentile": 0.0, "median": 0.0}
    assert (paths.tokenizer / "new_tokens.txt").read_text() == ""
    assert (paths.tokenizer / "tokenizer.model").read_bytes() == (paths.raw_model / "tokenizer.model").read_bytes()
    assert records.read_json(paths.tokenizer / "stage.json")["warnings"] == []
    assert program.main(["--compare"]) == 0  # of an existing build without new tokens


def test_the_order_of_the_documents_does_not_matter(program, paths):
    assert program.main(["--name", "one"]) == 0
    rows = list(records.read_jsonl(paths.plain_text / "train.jsonl"))
    random.Random(5).shuffle(rows)
    write(paths, "00_plain_text/train", rows)
    assert program.main(["--name", "two"]) == 0
    one, two = (paths.models / "tokenizer" / name for name in ("one", "two"))
    for name in ("tokenizer.json", "tokenizer.model", "new_tokens.txt"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_violation_is_a_bug_and_publishes_nothing(program, paths, monkeypatch):
    monkeypatch.setattr(tokenizers, "violations", lambda *_: ["ids are not contiguous"])
    with pytest.raises(AssertionError, match="not sound: ids are not contiguous"):
        program.main([])
    assert not paths.tokenizer.exists()


# what counts for what -----------------------------------------------------------------------------------


def mix_of(program, paths, **changes):
    return program.read_mix(paths, replace(profiles.get("tiny"), **changes))


def test_sources_are_counted_apart(program, paths):
    write(paths, "00_plain_text/train", [{"text": "이름:\n가나 다라"}, {"text": "이름:\n가나"}])
    write(paths, "02_kor_med_test/train", [item(0, "마바 가나?") | dict.fromkeys("ABCDE", "사아")])
    pairs = [{"source": "자차", "target": "x"}]
    records.write_jsonl(paths.pairs / "ko_to_en.jsonl", pairs)
    kept = next(t for t in ("카타", "파하", "고노", "도로") if not program.held_out_term(t))
    records.write_json(paths.dictionary, [{"term": kept, "definition": "소조"}])
    mix = mix_of(program, paths)
    assert mix.plain == {"이름": 1, "가나": 2, "▁다라": 1} and mix.terms == {kept: 1}
    assert mix.other == {"마바": 1, "▁가나": 1, "▁사아": 5, "자차": 1, "소조": 1}
    assert mix.weighted(5)[kept] == 5 and mix.weighted(1)[kept] == 1 and mix.weighted(5)["가나"] == 2
    assert (mix.documents, mix.characters, mix.share, mix.words) == (2, 15, 1.0, 9)
    assert sorted(mix.sample) == ["이름:\n가나", "이름:\n가나 다라"]


def test_held_out_text_is_never_counted(program, paths):
    terms = [f"{a}{b}질환" for a in "가나다라마바사아자차" for b in "거너더러머버서어저처"]
    out = [term for term in terms if program.held_out_term(term)]
    assert 0 < len(out) < 20
    records.write_json(paths.dictionary, [{"term": t, "definition": f"{t} 설명"} for t in terms])
    write(paths, "02_kor_med_test/dev", [item(0, "개발문제")])
    write(paths, "02_kor_med_test/test", [item(0, "시험문제")])
    write(paths, "00_plain_text/validation", [{"text": "검증문서"}])
    words = mix_of(program, paths).weighted(1)
    assert not {"개발문제", "시험문제", "검증문서", *out, *(f"▁{t}" for t in out)} & {*words}
    assert {t for t in terms if t in words} == {*terms} - {*out}
    texts, medical = program.held_out(paths)
    assert texts["terms"] == out and medical["terms"] == sum(map(len, out))


def test_a_given_minimum_counts_the_mix_and_the_profiles_the_plan(program, paths):
    """A word of the exam questions alone: never met by stage 00, so that it is no new token unless asked for."""
    write(paths, "02_kor_med_test/train", [item(i, f"{w} 게벨렘뎁") for i, w in enumerate(made_texts(40, 3))])
    assert program.main(["--name", "plan"]) == 0
    assert program.main(["--name", "mix", "--min-count", "30"]) == 0
    for name, found in (("plan", False), ("mix", True)):
        pieces = (paths.models / "tokenizer" / name / "new_tokens.txt").read_text(encoding="utf-8").split()
        assert ("▁게벨렘뎁" in pieces) is found
    settings = records.read_json(paths.models / "tokenizer" / "mix" / "stage.json")["settings"]
    assert (settings["min_count"], settings["min_count_in"]) == (30, "mix")


def test_a_large_file_is_read_in_part(program, paths):
    file = paths.plain_text / "train.jsonl"
    size = file.stat().st_size
    everything = {text for _, text in program.drawn(file, 1e9)}
    some = {text for _, text in program.drawn(file, size / 4e6)}
    assert len(everything) == 600 and 90 < len(some) < 210 and some < everything
    more = {text for _, text in program.drawn(file, size / 2e6)}
    assert some < more  # what is drawn stays drawn
    rows = list(records.read_jsonl(file))
    write(paths, "00_plain_text/train", [*reversed(rows)])
    assert {text for _, text in program.drawn(file, size / 4e6)} == some
    mix = mix_of(program, paths, counted_megabytes=size / 4e6)
    assert mix.documents == len(some) and mix.share == pytest.approx(0.25)
    # The plan is of the whole file, whatever was read of it.
    settings = tf.stage_settings(epochs=2, max_length=64)
    whole = mix_of(program, paths)
    passes = [program.planned_passes(settings, m, tf.base_tokenizer()) for m in (whole, mix)]
    assert passes == [2.0, pytest.approx(8.0)]


def test_the_plan_is_capped_by_rows(program, paths):
    mix = mix_of(program, paths)
    tokenizer, texts = (
        tf.base_tokenizer(),
        [row["text"] for row in records.read_jsonl(paths.plain_text / "train.jsonl")],
    )
    rows = [len(tokenizers.encode(tokenizer, text)) for text in texts]
    tokens = sum(n + 2 + (n - 1) // 62 for n in rows)  # <bos> of every row, <eos> of every document
    mix.sample = texts
    settings = tf.stage_settings(epochs=3, max_length=64, max_rows=50)
    assert program.planned_passes(settings, mix, tokenizer) == pytest.approx(3 * 50 * 64 / tokens)
    assert program.planned_passes(replace(settings, max_rows=10**9), mix, tokenizer) == 3


def test_uses_are_those_of_whole_documents(program, paths):
    """Counted by words, within 2 % of what encoding the documents gives."""
    assert program.main([]) == 0
    extended = tokenizers.load(paths.tokenizer)
    pieces = (paths.tokenizer / "new_tokens.txt").read_text(encoding="utf-8").split()
    in_plain, in_mix = program.uses(extended, pieces, mix_of(program, paths))
    texts = [row["text"] for row in records.read_jsonl(paths.plain_text / "train.jsonl")]
    ids = [i for text in texts for i in tokenizers.encode(extended, text)]
    found = [ids.count(i) for i in extended.convert_tokens_to_ids(pieces)]
    assert sum(in_plain) == pytest.approx(sum(found), rel=0.02) and sum(found) > 1000
    assert all(mixed >= plain for plain, mixed in zip(in_plain, in_mix, strict=True))


# comparison ---------------------------------------------------------------------------------------------


def test_compare_prints_three_tokenizers_and_publishes_nothing(program, paths, capsys):
    assert program.main(["--compare", "--new-tokens", "200"]) == 0
    told = capsys.readouterr().out
    assert not paths.tokenizer.exists()
    lines = {line.split("  ")[0].strip(): line.split("  ")[1:] for line in told.splitlines()}
    assert "continued BPE" in told.splitlines()[0]
    values = {name: [v.strip() for v in rest if v.strip()] for name, rest in lines.items()}
    assert values["English and code as in the base"] == ["yes", "yes", "yes"]
    assert values["new tokens not encoded to themselves"] == ["0", "0", "0"]
    base, glued, learned = map(float, values["tokens per character, medical"])
    assert learned < glued and learned < base
    assert values["of them new"][0] == "0" and values["of them new"][2] == "200"
    assert program.main(["--new-tokens", "100"]) == 0
    capsys.readouterr()
    assert program.main(["--compare"]) == 0
    assert "comparing with model/tokenizer/tiny" in capsys.readouterr().out


def test_compare_takes_words_for_add_tokens(program, paths, tmp_path, capsys):
    file = tmp_path / "words.txt"
    file.write_text("고혈압\n▁뇌졸중\n", encoding="utf-8")
    assert program.main(["--compare", "--new-tokens", "50", "--words", str(file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("of them new"))
    assert line.split()[-2:] == ["2", "50"]
    file.write_text("고혈압\nstroke\n<0xEB>\n", encoding="utf-8")
    with pytest.raises(PipelineError, match="line 2: 'stroke' is not a Hangul word\n  line 3: '<0xEB>' holds a byte"):
        program.main(["--compare", "--words", str(file)])
    with pytest.raises(PipelineError, match="--words goes with --compare"):
        program.main(["--words", str(file)])


# bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("00_plain_text/train", [], "00_plain_text/train.jsonl: no training text to learn merges from"),
        ("00_plain_text/train", [{"text": "only English"}], "no Hangul in 1 document; is this Korean text"),
        ("00_plain_text/train", [{"title": "x"}], r"train.jsonl, line 1: no document \('text'\)"),
        ("00_plain_text/validation", [], "validation.jsonl: no held-out korean text\nWithout"),
        ("02_kor_med_test/dev", [], "dev.jsonl: no held-out medical text\nWithout"),
        ("00_english_replay/validation", [], "validation.jsonl: no held-out english text\nWithout"),
    ],
)
def test_empty_text_is_one_error(program, paths, name, rows, message):
    write(paths, name, rows)
    with pytest.raises(PipelineError, match=message):
        program.main([])
    assert not paths.tokenizer.exists()


def test_everything_that_is_empty_is_named_at_once(program, paths):
    write(paths, "00_plain_text/validation", [])
    write(paths, "02_kor_med_test/dev", [])
    with pytest.raises(PipelineError, match="(?s)no held-out korean text.*no held-out medical text"):
        program.main([])


def test_a_base_without_merges_is_one_error(program, paths):
    file = paths.raw_model / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    spec["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    file.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(PipelineError, match="holds no BPE merges"):
        program.main([])


@pytest.mark.parametrize("value", ["-1", "many", "1.5", "AUTO"])
def test_the_number_of_tokens_is_a_number_or_auto(program, value, capsys):
    with pytest.raises(SystemExit) as error:
        program.main([f"--new-tokens={value}"])
    assert error.value.code == 2 and "neither a number of tokens nor auto" in capsys.readouterr().err


def test_sizes_are_handed_on_by_prepare_all(load_program, monkeypatch, tmp_path):
    import sys

    monkeypatch.syspath_prepend(str(tf.Path(__file__).parents[1] / "script" / "model"))
    prepare_all, handed = load_program("prepare_all"), []
    monkeypatch.setattr(prepare_all.subprocess, "call", lambda command: 0)
    monkeypatch.setattr(prepare_all.prepare_tokenizer, "main", lambda argv: handed.append(argv) or 0)
    monkeypatch.setattr(prepare_all.add_lora, "main", lambda argv: handed.append(argv) or 0)
    assert prepare_all.main(["--new-tokens", "auto", "--min-count", "7", "--device", "cpu"]) == 0
    assert handed == [
        ["--model", "tiny", "--new-tokens", "auto", "--min-count", "7"],
        ["--model", "tiny", "--device", "cpu"],
    ]
    handed.clear()
    assert prepare_all.main(["--new-tokens", "0"]) == 0
    assert handed[0] == ["--model", "tiny", "--new-tokens", "0"]
    assert sys.modules["prepare_tokenizer"]

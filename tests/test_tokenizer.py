"""Continued BPE against a brute-force one, the two written forms against each other, and every check that can fail."""

import random
import shutil

import pytest
import torch_fixtures as tf

from medgemma_korean import bpe, records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.bpe import HANGUL_PIECE, MAX_SYLLABLES, continue_bpe, count_words
from medgemma_korean.cli import PipelineError
from medgemma_korean.tokenizer import check_extended, encode

MEDICAL = "The patient's HbA1c was 7.2 %; metformin 500 mg b.i.d."


def sentencepiece_of(folder):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# the base -----------------------------------------------------------------------------------------------


def test_base_has_gemmas_ids():
    tokenizer = tf.base_tokenizer()
    named = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token]
    assert named == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert tokenizer.convert_tokens_to_ids([*named, "<mask>"]) == [0, 1, 2, 3, 4]
    assert len(tokenizer) == 701 and tokenizer.convert_tokens_to_ids("<image_soft_token>") == 700
    assert sorted(tokenizer.get_vocab().values()) == list(range(701))
    for marker in (tokenizers.START_OF_TURN, tokenizers.END_OF_TURN, "\n", "\n\n", "▁▁"):
        known = tokenizer.convert_tokens_to_ids(marker)
        assert tokenizer(marker.replace("▁", " "), add_special_tokens=False)["input_ids"] == [known], marker
        assert known > tokenizer.unk_token_id
    assert [f"<0x{byte:02X}>" in tokenizer.get_vocab() for byte in range(256)] == [True] * 256


def test_base_falls_back_to_bytes_and_never_to_unknown():
    tokenizer = tf.base_tokenizer()
    ids = encode(tokenizer, "뷁🙂")
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["<0xEB>", "<0xB7>", "<0x81>"]
    assert len(ids) == 7 and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == "뷁🙂"


def test_base_adds_bos_once_and_no_space():
    tokenizer = tf.base_tokenizer()
    assert tokenizer("고혈압")["input_ids"] == [2, *encode(tokenizer, "고혈압")]
    assert not tokenizer.convert_ids_to_tokens(encode(tokenizer, "고혈압"))[0].startswith("▁")


@pytest.mark.parametrize("folder, load", [(tf.tokenizer_folder, tf.base_tokenizer), (tf.extended_folder, tf.tokenizer)])
def test_both_forms_give_the_same_ids(folder, load):
    model, tokenizer = sentencepiece_of(folder()), load()
    assert model.get_piece_size() == len(tokenizer)
    documents = [*tf.texts(100, seed=8), *tf.random_korean(100, seed=9), MEDICAL, "뷁 🙂\n\n  두 칸"]
    different = [d for d in documents if model.encode(d) != encode(tokenizer, d)]
    assert different == []


def test_base_is_the_same_bytes_when_built_again(tmp_path):
    tokenizers.build_base(tmp_path, [*tf.KOREAN, *tf.ENGLISH], 700)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tf.tokenizer_folder() / name).read_bytes(), name


def test_special_tokens_in_a_text_are_text():
    """A web page about language models must neither end a document nor stop a training."""
    text = "모델의 <bos>와 <pad>, <end_of_turn> 토큰"
    ids = encode(tf.tokenizer(), text)
    assert not {0, 1, 2, *tf.tokenizer().convert_tokens_to_ids(["<end_of_turn>"])} & {*ids}
    assert tf.tokenizer().decode(ids) == text
    assert tf.tokenizer()("<bos>", add_special_tokens=False)["input_ids"] == [2]  # templates still use them


@pytest.mark.parametrize("characters", [1, 50, 200_000])
def test_many_texts_encode_as_each_alone(monkeypatch, characters):
    monkeypatch.setattr(tokenizers, "CHUNK", characters)
    tokenizer = tf.tokenizer()
    texts = [
        "",
        *tf.texts(60, seed=4),
        *tokenizers.random_texts(300, seed=5),
        *tokenizers.CODE,
        " ".join(tf.KOREAN * 9),
    ]
    texts += ["<bos>모델의 <pad>와 <end_of_turn>\n", "", " 앞 칸", "\u3000\u200b\x00"]
    tokenizer(texts[:3], padding=True, truncation=True, max_length=4)  # leaves its settings in the tokenizer
    found = list(tokenizers.encode_all(tokenizer, iter(texts)))
    assert found == [encode(tokenizer, text) for text in texts] and found[0] == []
    assert list(tokenizers.encode_all(tokenizer, [])) == []
    assert tokenizer("<bos>", add_special_tokens=False)["input_ids"] == [2]  # as templates need it afterwards


def test_many_texts_are_read_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(tokenizers, "CHUNK", 100)
    read = []
    texts = (read.append(n) or "가나다라 " * 10 for n in range(1000))
    next(tokenizers.encode_all(tf.tokenizer(), texts))
    assert len(read) == 2


def test_chat_template():
    tokenizer = tf.base_tokenizer()
    turns = [
        {"role": "system", "content": "짧게"},
        {"role": "user", "content": " 질문 "},
        {"role": "assistant", "content": "답"},
        {"role": "user", "content": "또"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\n짧게\n\n질문<end_of_turn>\n<start_of_turn>model\n답<end_of_turn>\n"
        "<start_of_turn>user\n또<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="alternate"):
        tokenizer.apply_chat_template([turns[1], turns[1]], tokenize=False)


def test_rows_for():
    assert [tokenizers.rows_for(n) for n in (1, 64, 65, 262_145)] == [64, 64, 128, 262_208]
    assert tokenizers.rows_for(262_150, at_least=262_208) == 262_208
    assert tokenizers.rows_for(272_145, at_least=262_208) == 272_192


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(PipelineError, match="no tokenizer.json"):
        tokenizers.load(tmp_path)


# continued BPE ------------------------------------------------------------------------------------------


def extend(words, *, known="가나다라마바사▁", limit=100, min_count=1.0, segment=list):
    """continue_bpe over words given as {word: count} or {word: [weighted, real]}."""
    weighted = {word: n[0] if isinstance(n, list) else n for word, n in words.items()}
    real = {word: n[1] if isinstance(n, list) else n for word, n in words.items()}
    return continue_bpe(weighted, segment, set(known), limit, min_count, real=real)


def test_words_are_counted_with_their_space():
    assert count_words(["가나 다라, 가나 A형 12가", "가나"]) == {"가나": 2, "▁다라": 1, "▁가나": 1, "형": 1, "가": 1}


def test_lines_are_counted_once_and_composed():
    seen = set()
    lines = list(bpe.distinct_lines(["이름:\n가나", " 이름:\n다라", "\u1100\u1161나"], seen))
    assert lines == ["이름:", "가나", "다라"]  # the third text is 가나 in parts
    assert list(bpe.distinct_lines(["이름:\n마바"], seen)) == ["마바"]


def test_remembered_lines_are_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "MOST_LINES", 2)
    assert list(bpe.distinct_lines(["가\n나\n다\n가\n다"])) == ["가", "나", "다", "다"]


def test_words_seen_once_are_left_out_of_large_counts():
    assert bpe.without_rare({"가": 1, "나": 2}, 2) == {"가": 1, "나": 2}
    assert bpe.without_rare({"가": 1, "나": 2}, 1) == {"나": 2}


def test_merges_are_exactly_those_of_bpe():
    # 가나 stands in 5 words, then 가나+다 in 3, then 라마 in 2.
    found = extend({"가나다": 3, "가나": 2, "라마": 2, "바사": 1}, min_count=2)
    assert found.merges == [("가", "나"), ("가나", "다"), ("라", "마")]
    assert found.syllables == [] and found.pieces == ["가나", "가나다", "라마"]


def test_limit_is_the_number_of_pieces():
    assert extend({"가나다": 3, "라마": 2}, limit=1).pieces == ["가나"]
    assert extend({"가나다": 3}, limit=0).pieces == []
    assert extend({"뷁가나": 9}, limit=1, segment=lambda w: ["<0xEB>", "<0xB7>", "<0x81>", *w[1:]]).pieces == ["뷁"]


def test_ties_do_not_depend_on_the_order_of_the_input():
    words = {"다라": 2, "가나": 2, "마바": 2}
    expected = [("가", "나"), ("다", "라"), ("마", "바")]
    assert extend(words).merges == extend(dict(reversed(words.items()))).merges == expected


def test_vetoes():
    known = "가나다라마바사▁"
    # A byte is never merged, and nothing across it either.
    byted = {"뷁가나": ["<0xEB>", "<0xB7>", "<0x81>", "가", "나"]}
    assert extend({"뷁가나": 3}, segment=byted.__getitem__, min_count=4).pieces == []
    rare = extend({"뷁가나": 3, "가나": 1}, segment=lambda w: byted.get(w, list(w)), min_count=4)
    assert rare.merges == [("가", "나")]
    # Not Hangul, or with a space inside.
    assert extend({"가a": 9}, known=known + "a").pieces == []
    assert extend({"가▁나": 9}, known=[*known, "▁나"]).pieces == []
    # Known already: the base had a reason not to use it here.
    assert extend({"가나": 9}, known=[*known, "가나"]).pieces == []
    # Longer than five syllables; the space does not count.
    six = extend({"▁가나다라마바": 9})
    assert max(len(p.lstrip("▁")) for p in six.pieces) == MAX_SYLLABLES and all(map(HANGUL_PIECE.fullmatch, six.pieces))


def test_minimum_is_of_real_occurrences_and_order_of_weighted_ones():
    words = {"가나": [50, 2], "다라": [10, 10]}
    assert extend(words, min_count=1).merges == [("가", "나"), ("다", "라")]
    assert extend(words, min_count=3).merges == [("다", "라")]


def test_missing_syllables_become_whole_pieces_without_a_merge():
    def segment(word):
        return [p for s in word for p in ([f"<0x{b:02X}>" for b in s.encode()] if s in "뷁쉡" else [s])]

    found = extend({"▁뷁가": 5, "쉡": 2, "나뷁": 1}, segment=segment, min_count=3)
    assert found.syllables == ["뷁"]  # 6 occurrences; 쉡 has 2
    # The byte triple has become one piece that takes part in merges.
    assert found.merges == [("▁", "뷁"), ("▁뷁", "가")]


def brute_force(words, segment, known, limit, min_count):
    """Continued BPE that counts everything anew for every merge."""
    seen = {}
    for word, (_, n) in words.items():
        for s in word.replace("▁", ""):
            if s not in known:
                seen[s] = seen.get(s, 0) + n
    syllables = sorted((s for s in seen if seen[s] >= min_count), key=lambda s: (-seen[s], s))[:limit]
    state = {}
    for word in words:
        pieces = []
        for s in word:
            pieces += [s] if s in syllables else segment(s)
        state[word] = pieces
    taken, merges = {*known, *syllables}, []
    while len(syllables) + len(merges) < limit:
        weighted, real = {}, {}
        for word, pieces in state.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                weighted[pair] = weighted.get(pair, 0) + words[word][0]
                real[pair] = real.get(pair, 0) + words[word][1]
        allowed = [
            pair
            for pair in weighted
            if real[pair] >= min_count
            and "<" not in pair[0] + pair[1]
            and HANGUL_PIECE.fullmatch("".join(pair))
            and "".join(pair) not in taken
            and len("".join(pair).lstrip("▁")) <= MAX_SYLLABLES
        ]
        if not allowed:
            break
        pair = min(allowed, key=lambda p: (-weighted[p], p))
        merges.append(pair)
        taken.add("".join(pair))
        for word, pieces in state.items():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == pair:
                    pieces[i : i + 2] = ["".join(pair)]
                i += 1
            state[word] = pieces
    return syllables, merges


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_on_random_words(seed):
    rng = random.Random(seed)
    syllables = "가나다라마뷁쉡"[: rng.randint(3, 7)]

    def segment(word):
        return [p for s in word for p in ([f"<0x{b:02X}>" for b in s.encode()] if s in "뷁쉡" else [s])]

    words = {}
    for _ in range(60):
        word = rng.choice(("", "▁")) + "".join(rng.choices(syllables, k=rng.randint(1, 7)))
        words[word] = [rng.randint(1, 20), rng.randint(1, 6)]
    known = {*"가나다라마▁", *(["가나", "나다라"] if seed % 2 else [])}
    limit, min_count = rng.choice((5, 30, 1000)), rng.choice((1, 4, 9.5))
    weighted, real = ({word: n[i] for word, n in words.items()} for i in (0, 1))
    found = continue_bpe(weighted, segment, known, limit, min_count, real=real)
    assert (found.syllables, found.merges) == brute_force(words, segment, known, limit, min_count)


@pytest.mark.parametrize("seed", range(4))
def test_a_piece_that_nothing_absorbs_is_used_often_enough(seed):
    """Why nothing is pruned: only parts of longer pieces are used less than a merge needs."""
    rng = random.Random(seed)
    words = {"".join(rng.choices("가나다라마바사", k=rng.randint(2, 6))): rng.randint(1, 9) for _ in range(200)}
    found = extend(words, min_count=12)
    ranks = {merge: rank for rank, merge in enumerate(found.merges)}
    used = dict.fromkeys(found.pieces, 0)
    for word, n in words.items():
        pieces = list(word)
        while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]:
            pair = min(pairs, key=ranks.__getitem__)
            at = next(i for i in range(len(pieces)) if (pieces[i], pieces[i + 1]) == pair)
            pieces[at : at + 2] = ["".join(pair)]
        for piece in pieces:
            if piece in used:
                used[piece] += n
    inner = {part for merge in found.merges for part in merge}
    assert len(found.merges) > 10
    assert min(n for piece, n in used.items() if piece not in inner) >= 12


def test_a_missing_syllable_may_need_more_than_a_merge():
    def bytes_of(word):
        return [f"<0x{b:02X}>" for s in word for b in s.encode()]

    assert continue_bpe({"뷁": 6}, bytes_of, set(), 9, 2).syllables == ["뷁"]
    assert continue_bpe({"뷁": 6}, bytes_of, set(), 9, 2, syllable_count=7).syllables == []


@pytest.mark.parametrize("load", [tf.base_tokenizer, tf.tokenizer])
def test_words_are_cut_as_whole_texts_are(load):
    tokenizer = load()
    words = count_words([*tf.texts(200, seed=2), *tf.random_korean(300, seed=2), "뷁 뮤코쉴드"])
    segment = tokenizers.segmenter(tokenizer)
    for word in words:
        assert segment(word) == tokenizer.convert_ids_to_tokens(encode(tokenizer, word.replace("▁", " ")))
    assert len(words) > 500


# the extended tokenizer ---------------------------------------------------------------------------------


def test_extended_is_sound():
    pieces = tf.extension().pieces
    assert tf.extension().syllables and tf.extension().merges
    samples = [*tf.texts(100, seed=4), *tf.random_korean(100, seed=5), MEDICAL]
    assert check_extended(tf.base_tokenizer(), tf.tokenizer(), pieces, samples) == []
    ids = [i for text in tf.texts(200, 3, tf.KOREAN) for i in encode(tf.tokenizer(), text)]
    assert set(ids) & set(tf.new_ids())
    base = tokenizers.tokens_per_character(tf.base_tokenizer(), tf.KOREAN)
    assert tokenizers.tokens_per_character(tf.tokenizer(), tf.KOREAN) < base


def test_every_invariant_holds_of_the_extended():
    documents = [*tf.texts(300, seed=14), *tf.random_korean(200, seed=15), MEDICAL]
    assert tokenizers.violations(tf.tokenizer_folder(), tf.extended_folder(), tf.extension(), documents) == []


@pytest.mark.parametrize("text", ["<R>", "<R/>", "<reasoning>", "</reasoning>", "<R>고혈압<R/>"])
def test_tags_stay_ordinary_text(text):
    tokenizer = tf.tokenizer()
    ids = encode(tokenizer, text)
    assert len(ids) > 2 and tokenizer.decode(ids) == text
    tags = [part for part in ("<R>", "<R/>", "<reasoning>", "</reasoning>") if part in text]
    assert not {*tags} & {*tokenizer.get_vocab(), *tokenizer.convert_ids_to_tokens(ids)}
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_copy_keeps_every_byte(tmp_path):
    (tmp_path / "more").mkdir()
    tokenizers.copy(tf.extended_folder(), tmp_path / "more")
    names = {file.name for file in (tmp_path / "more").iterdir()}
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"} <= names
    for name in names:
        assert (tmp_path / "more" / name).read_bytes() == (tf.extended_folder() / name).read_bytes()
    with pytest.raises(PipelineError, match="no tokenizer.json"):
        tokenizers.copy(tmp_path, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_old_ids_stay_after_save_and_reload(tmp_path):
    tf.tokenizer().save_pretrained(tmp_path)
    reloaded = tokenizers.load(tmp_path)
    old, new = tf.base_tokenizer().get_vocab(), reloaded.get_vocab()
    assert {token: new[token] for token in old} == old
    assert reloaded.convert_tokens_to_ids("<image_soft_token>") == 700
    assert [new[piece] for piece in tf.extension().pieces] == list(range(701, 701 + len(tf.extension().pieces)))
    assert len(reloaded) == len(new) == 701 + len(tf.extension().pieces)
    assert reloaded.chat_template == tf.base_tokenizer().chat_template
    assert encode(reloaded, tf.KOREAN[0]) == encode(tf.tokenizer(), tf.KOREAN[0])


def test_text_without_hangul_is_untouched():
    rng = random.Random(6)
    printable = [chr(c) for c in (*range(32, 127), *range(0xA1, 0x180), 0x3042, 0x4E2D, 0x1F642, 10, 9)]
    texts = [*tf.ENGLISH, MEDICAL, *("".join(rng.choices(printable, k=30)) for _ in range(300))]
    assert [t for t in texts if encode(tf.tokenizer(), t) != encode(tf.base_tokenizer(), t)] == []


def test_random_unicode_round_trips():
    tokenizer, made = tf.tokenizer(), tokenizers.random_texts(10_000, seed=7)
    assert [t for t in made if tokenizer.decode(encode(tokenizer, t), clean_up_tokenization_spaces=False) != t] == []
    assert made == tokenizers.random_texts(10_000, seed=7) != tokenizers.random_texts(10_000, seed=8)
    hangul = [any("가" <= c <= "힣" for c in text) for text in made]
    assert not any(hangul[::3]) and sum(hangul) > 5000
    assert not any(c == "▁" or "\ud800" <= c <= "\udfff" for text in made for c in text)
    assert len({ord(c) >> 16 for text in made for c in text}) == 17  # all planes


def test_nothing_to_add_leaves_the_same_tokenizer(tmp_path):
    tokenizers.write_extended(tf.tokenizer_folder(), tmp_path, tokenizers.Extension([], []))
    same = tokenizers.load(tmp_path)
    assert same.get_vocab() == tf.base_tokenizer().get_vocab()
    assert check_extended(tf.base_tokenizer(), same, [], list(tf.KOREAN)) == []


def test_image_token_outside_the_vocabulary_keeps_its_id(tmp_path):
    """Gemma's own files: the image token only among the added tokens, and beyond the SentencePiece model's end."""
    from sentencepiece import sentencepiece_model_pb2

    base = tmp_path / "base"
    shutil.copytree(tf.tokenizer_folder(), base)
    spec = tf.read(base / "tokenizer.json")
    del spec["model"]["vocab"]["<image_soft_token>"]
    records.write_json(base / "tokenizer.json", spec)
    proto = sentencepiece_model_pb2.ModelProto.FromString((base / "tokenizer.model").read_bytes())
    del proto.pieces[-1]
    (base / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizers.write_extended(base, tmp_path / "extended", tf.extension())
    extended = tokenizers.load(tmp_path / "extended")
    assert extended.convert_tokens_to_ids("<image_soft_token>") == 700
    assert extended.get_vocab() == tf.tokenizer().get_vocab()
    assert sentencepiece_of(tmp_path / "extended").piece_to_id("<image_soft_token>") == 700


def broken(tmp_path, change):
    """The extended tokenizer after `change` was done to its tokenizer.json."""
    shutil.copytree(tf.extended_folder(), tmp_path / "broken")
    spec = tf.read(tmp_path / "broken" / "tokenizer.json")
    change(spec["model"]["vocab"], spec["model"]["merges"])
    records.write_json(tmp_path / "broken" / "tokenizer.json", spec)
    return tokenizers.load(tmp_path / "broken")


def test_check_reports_a_moved_id(tmp_path):
    def swap(vocab, merges):
        first, second = [t for t in vocab if HANGUL_PIECE.fullmatch(t)][:2]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    wrong = check_extended(tf.base_tokenizer(), broken(tmp_path, swap), tf.extension().pieces, [])
    assert wrong and wrong[0].startswith("2 old ids moved")


def test_check_reports_a_hole(tmp_path):
    def lift(vocab, merges):
        vocab[tf.extension().pieces[-1]] += 1

    wrong = check_extended(tf.base_tokenizer(), broken(tmp_path, lift), tf.extension().pieces, [])
    assert "ids are not contiguous" in wrong


def test_check_reports_latin_and_known_pieces(tmp_path):
    latin = tokenizers.Extension([], [("a", "z"), ("혈", "압")])
    tokenizers.write_extended(tf.tokenizer_folder(), tmp_path / "latin", latin)
    wrong = check_extended(tf.base_tokenizer(), tokenizers.load(tmp_path / "latin"), ["az"], ["az"])
    assert any("'az' is not new Hangul" in line for line in wrong)
    assert any("text without Hangul encodes differently" in line for line in wrong)
    known = next(t for t in tf.base_tokenizer().get_vocab() if HANGUL_PIECE.fullmatch(t))
    wrong = check_extended(tf.base_tokenizer(), tf.base_tokenizer(), [known], [])
    assert any("is not new Hangul" in line for line in wrong)


def test_check_reports_byte_pieces(tmp_path):
    merged = tokenizers.Extension([], [("<0xEB>", "<0xB7>")])
    tokenizers.write_extended(tf.tokenizer_folder(), tmp_path / "bytes", merged)
    wrong = check_extended(tf.base_tokenizer(), tokenizers.load(tmp_path / "bytes"), merged.pieces, ["뷁"])
    assert any("is not new Hangul" in line for line in wrong)
    assert any("do not encode to themselves" in line for line in wrong)
    assert any("does not round-trip" in line for line in wrong)


def test_check_reports_a_piece_that_is_never_produced_and_one_that_is_missing(tmp_path):
    def unmerge(vocab, merges):
        del merges[-1]

    wrong = check_extended(tf.base_tokenizer(), broken(tmp_path, unmerge), tf.extension().pieces, [])
    assert [line for line in wrong if "1 new pieces do not encode to themselves" in line]
    wrong = check_extended(tf.base_tokenizer(), tf.tokenizer(), [*tf.extension().pieces, "뷁뷁"], [])
    assert any("do not encode to themselves" in line and "뷁뷁" in line for line in wrong)


def test_check_reports_what_is_wrong_in_the_files(tmp_path):
    extension = tf.extension()

    def check(change):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        broken(tmp_path, change)
        return tokenizers.check_files(tf.tokenizer_folder(), tmp_path / "broken", extension)

    assert check(lambda vocab, merges: None) == []
    assert check(lambda vocab, merges: merges.insert(0, merges.pop())) == [
        "the base's merges are not the first ones",
        "the new merges are not those that were learned, in their order",
    ]
    whole = next(left + right for left, right in extension.merges if left + right != extension.pieces[-1])
    part = next(merge[0] for merge in extension.merges if "".join(merge) == whole)
    swapped = check(lambda vocab, merges: vocab.update({part: vocab[whole], whole: vocab[part]}))
    assert f"the parts of {whole!r} do not exist before it" in swapped
    merged = tokenizers.Extension([], [("<0xEB>", "<0xB7>")])
    tokenizers.write_extended(tf.tokenizer_folder(), tmp_path / "bytes", merged)
    wrong = tokenizers.check_files(tf.tokenizer_folder(), tmp_path / "bytes", merged)
    assert wrong == ["a byte is merged in '<0xEB><0xB7>'"]


def test_check_reports_two_forms_that_differ(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    shutil.copytree(tf.extended_folder(), tmp_path / "other")
    file, both = tmp_path / "other" / "tokenizer.model", (tf.base_tokenizer(), tf.tokenizer())
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    del proto.pieces[-20:]
    file.write_bytes(proto.SerializeToString())
    wrong = tokenizers.check_forms(tf.tokenizer_folder(), tmp_path / "other", list(tf.KOREAN), *both)
    size = len(tf.tokenizer())
    assert wrong[0] == f"tokenizer.model has {size - 20} pieces, tokenizer.json {size} ids" and len(wrong) > 1
    file.unlink()
    shutil.copytree(tf.tokenizer_folder(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").unlink()
    assert tokenizers.check_forms(tmp_path / "base", tmp_path / "other", list(tf.KOREAN), *both) == []


def test_a_marker_in_a_document_is_no_fault_of_the_two_forms():
    text = "모델의 <start_of_turn>과 <bos> 토큰"
    assert sentencepiece_of(tf.tokenizer_folder()).encode(text) != encode(tf.base_tokenizer(), text)
    both = tf.base_tokenizer(), tf.tokenizer()
    assert tokenizers.check_forms(tf.tokenizer_folder(), tf.extended_folder(), [text], *both) == []


# input --------------------------------------------------------------------------------------------------


def test_a_base_without_merges_or_with_another_model_is_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tf.tokenizer_folder(), base)
    spec = tf.read(base / "tokenizer.json")
    for model in ({"type": "WordPiece", "vocab": {"a": 0}}, {"type": "Unigram", "vocab": []}, None):
        records.write_json(base / "tokenizer.json", spec | {"model": model})
        with pytest.raises(PipelineError, match="tokenizer.json: holds no BPE merges"):
            tokenizers.write_extended(base, tmp_path / "extended", tf.extension())
    records.write_json(base / "tokenizer.json", spec | {"model": spec["model"] | {"merges": []}})
    with pytest.raises(PipelineError, match="holds no BPE merges"):
        tokenizers.read_spec(base)


def test_a_model_file_of_another_tokenizer_is_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tf.tokenizer_folder(), base)
    shutil.copyfile(tf.extended_folder() / "tokenizer.model", base / "tokenizer.model")
    with pytest.raises(PipelineError, match=r"tokenizer.model: 7\d\d pieces, but tokenizer.json beside it has 701 ids"):
        tokenizers.write_extended(base, tmp_path / "extended", tf.extension())


def test_a_list_of_words_is_read_or_refused_at_once(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("고혈압\n▁당뇨병\n\n", encoding="utf-8")
    assert tokenizers.read_words(file) == ["고혈압", "▁당뇨병"]
    file.write_text("고혈압\nMRI검사\n<0xEB>혈\n고혈압\n" + "x\n" * 4, encoding="utf-8")
    with pytest.raises(PipelineError) as error:
        tokenizers.read_words(file)
    told = str(error.value)
    assert "line 2: 'MRI검사' is not a Hangul word" in told and "line 3: '<0xEB>혈' holds a byte piece" in told
    assert "line 4: '고혈압' stands in line 1 already" in told and told.endswith("and 2 more")
    file.write_bytes(b"\xb0\xed")
    with pytest.raises(PipelineError, match="no list of Hangul words"):
        tokenizers.read_words(file)
    file.write_text("")
    with pytest.raises(PipelineError, match="no list of Hangul words"):
        tokenizers.read_words(file)
    with pytest.raises(PipelineError, match="no such file"):
        tokenizers.read_words(tmp_path / "nothing")

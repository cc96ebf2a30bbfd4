"""Continued BPE against a brute-force one, the two written forms against each other, and every check that can fail."""

import random
import shutil

import pytest
import torch_fixtures as tf

from medgemma_korean import records
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError
from medgemma_korean.tokenizer import HANGUL_PIECE, MAX_SYLLABLES, check_extended, continue_bpe, count_words, encode

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
    counts = {word: n if isinstance(n, list) else [n, n] for word, n in words.items()}
    return continue_bpe(counts, segment, set(known), limit, min_count)


def test_words_are_counted_with_their_space_and_their_weight():
    words = count_words(["가나 다라, 가나 A형 12가"])
    assert words == {"가나": [1, 1], "▁다라": [1, 1], "▁가나": [1, 1], "형": [1, 1], "가": [1, 1]}
    count_words(["가나"], weight=5, into=words)
    assert words["가나"] == [6, 2]


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
    found = continue_bpe(words, segment, known, limit, min_count)
    assert (found.syllables, found.merges) == brute_force(words, segment, known, limit, min_count)


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
    rng, tokenizer = random.Random(7), tf.tokenizer()
    planes = [(32, 126), (0xA0, 0x24F), (0x370, 0x52F), (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
    planes += [(0x1100, 0x11FF), (0x1F300, 0x1F6FF), (0x20000, 0x2A6DF), (1, 31)]
    wrong = []
    for _ in range(2000):
        text = "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 24))).replace("▁", "")
        if tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) != text:
            wrong.append(text)
    assert wrong == []


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

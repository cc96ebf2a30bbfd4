"""The tokenizer: a small base of Gemma's structure, and continued BPE that extends any Gemma tokenizer.

New pieces come from continuing the base tokenizer's own merges over Hangul words: every old id, every old
segmentation and all text without Hangul stay exactly as they were. Words glued on with `add_tokens` would make
Korean text longer and cut through words; a union of two vocabularies leaves pieces that are never produced.
"""

from __future__ import annotations

import heapq
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_korean import records
from medgemma_korean.cli import PipelineError

IMAGE_TOKEN = "<image_soft_token>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
HANGUL_PIECE = re.compile(r"▁?[가-힣]+")
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
MAX_SYLLABLES = 5  # longer pieces are free of gain and are phrases of one source
ROW_MULTIPLE = 64  # embedding rows; tensor cores like it, and the base checkpoint does so

# Gemma's chat template in its text-only form: no system role (its text goes before the first user turn), strict
# alternation, `<start_of_turn>model\n` as the generation prompt.
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('turns must alternate user/assistant') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}"""


def rows_for(ids: int, at_least: int = 0) -> int:
    """Embedding rows for that many token ids: a multiple of 64, never fewer than the base's."""
    return max(-(-ids // ROW_MULTIPLE) * ROW_MULTIPLE, at_least)


# a small base -------------------------------------------------------------------------------------------


def build_base(folder: Path, texts: Iterable[str], vocab: int) -> None:
    """Train a byte-fallback SentencePiece BPE model of Gemma's structure and write it in both forms.

    Ids as in Gemma: pad 0, eos 1, bos 2, unk 3, mask 4, then turn markers, newline and space runs, bytes, pieces;
    the image token takes the last id, outside the SentencePiece model's own pieces. Deterministic.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    runs = ["\n" * n for n in range(1, 5)] + ["▁" * n for n in range(2, 9)]
    special = ["<mask>", START_OF_TURN, END_OF_TURN, "<start_of_image>", "<end_of_image>"]
    folder.mkdir(parents=True, exist_ok=True)
    model_file = folder / "tokenizer.model"
    with open(model_file, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_lines(texts)),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=special + runs,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            num_threads=1,  # the result must not depend on the machine
            minloglevel=2,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    image = proto.pieces.add()
    image.piece, image.score, image.type = IMAGE_TOKEN, 0.0, proto.SentencePiece.USER_DEFINED
    model_file.write_bytes(proto.SerializeToString())
    _convert(proto, folder, special)


def _lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        yield from (line for line in text.splitlines() if line.strip())


def _convert(proto: Any, folder: Path, special: list[str]) -> None:
    """The Hugging Face form of a SentencePiece BPE model, the way transformers converts Gemma's."""
    from transformers import GemmaTokenizer

    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL or piece.type == 4}
    merges = []
    for piece in normal:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += [(normal[piece], vocab[left], vocab[right], left, right) for left, right in splits]
    # A piece's rank is its merge's rank; among splits of one piece the earlier parts come first.
    merges.sort(key=lambda m: m[:3])
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=[(left, right) for *_, left, right in merges],
        additional_special_tokens=[t for t in special if t != "<mask>"] + [IMAGE_TOKEN],
        add_bos_token=True,  # as Gemma's own file does for text that is tokenised without a chat template
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


# continued BPE ------------------------------------------------------------------------------------------


@dataclass
class Extension:
    """What continued BPE learned, in order: whole syllables that the base lacks, then merges."""

    syllables: list[str]
    merges: list[tuple[str, str]]

    @property
    def pieces(self) -> list[str]:
        return self.syllables + [left + right for left, right in self.merges]


def count_words(
    texts: Iterable[str], weight: int = 1, into: dict[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """Hangul words `▁?[가-힣]+` of the texts: word -> [weighted count, real count]."""
    words: dict[str, list[int]] = into if into is not None else {}
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(HANGUL_PIECE.findall(text.replace(" ", "▁")))
    for word, n in counts.items():
        entry = words.setdefault(word, [0, 0])
        entry[0] += weight * n
        entry[1] += n
    return words


def continue_bpe(
    words: Mapping[str, list[int]],
    segment: Callable[[str], list[str]],
    known: set[str],
    limit: int,
    min_count: float,
) -> Extension:
    """Continue a tokenizer's merges over Hangul words.

    words: word -> [weighted count, real count]; merges are ranked by the first and need `min_count` of the second.
    segment: the base tokenizer's pieces of a word. known: the base vocabulary. limit: most pieces to add.
    A merge is vetoed when a part is a byte piece, the result is not Hangul, exists already, or has more than five
    syllables. Ties are broken by the pair's text, so that the result does not depend on the order of the input.
    Time is linear in the words that hold a merged pair (pair index and lazy heap).
    """
    syllables = _missing_syllables(words, known, limit, min_count)
    extra = set(syllables)
    symbols: list[list[str]] = []
    weights: list[tuple[int, int]] = []
    for word in sorted(words):
        pieces = _with_syllables(segment(word), word, extra)
        if len(pieces) > 1:
            symbols.append(pieces)
            weights.append((words[word][0], words[word][1]))

    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, pieces in enumerate(symbols):
        for pair in zip(pieces, pieces[1:], strict=False):
            counts[pair] += weights[index][0]
            where[pair].add(index)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)

    merges: list[tuple[str, str]] = []
    taken = set(known) | extra
    while heap and len(syllables) + len(merges) < limit:
        negative, pair = heapq.heappop(heap)
        current = counts.get(pair, 0)
        if current != -negative:
            if current > 0:
                heapq.heappush(heap, (-current, pair))
            continue
        if _vetoed(pair, taken) or _real_count(pair, where[pair], symbols, weights) < min_count:
            counts.pop(pair)
            where.pop(pair)
            continue
        joined = pair[0] + pair[1]
        taken.add(joined)
        merges.append(pair)
        touched = set()
        for index in sorted(where.pop(pair)):
            before = symbols[index]
            after = _merge(before, pair, joined)
            weight = weights[index][0]
            for old in zip(before, before[1:], strict=False):
                counts[old] -= weight
                if old in where:
                    where[old].discard(index)
            for new in zip(after, after[1:], strict=False):
                counts[new] += weight
                where[new].add(index)
                touched.add(new)
            symbols[index] = after
        counts.pop(pair, None)
        for new in touched:
            if counts.get(new, 0) > 0:
                heapq.heappush(heap, (-counts[new], new))
    return Extension(syllables, merges)


def _missing_syllables(words: Mapping[str, list[int]], known: set[str], limit: int, min_count: float) -> list[str]:
    seen: Counter[str] = Counter()
    for word, (_, n) in words.items():
        for syllable in word.lstrip("▁"):
            if syllable not in known:
                seen[syllable] += n
    return [s for s, n in sorted(seen.items(), key=lambda item: (-item[1], item[0])) if n >= min_count][:limit]


def _with_syllables(pieces: list[str], word: str, extra: set[str]) -> list[str]:
    """The pieces of a word after the byte triples of the added syllables have become one piece each."""
    if not any(s in extra for s in word):
        return pieces
    result, at, i = [], 0, 0
    while i < len(pieces):
        if BYTE_PIECE.fullmatch(pieces[i]):
            if word[at] in extra:
                result.append(word[at])
            else:
                result += pieces[i : i + 3]  # a Hangul syllable is three bytes of UTF-8
            at, i = at + 1, i + 3
        else:
            result.append(pieces[i])
            at, i = at + len(pieces[i]), i + 1
    return result


def _vetoed(pair: tuple[str, str], taken: set[str]) -> bool:
    joined = pair[0] + pair[1]
    return (
        BYTE_PIECE.fullmatch(pair[0]) is not None
        or BYTE_PIECE.fullmatch(pair[1]) is not None
        or HANGUL_PIECE.fullmatch(joined) is None
        or joined in taken
        or len(joined.lstrip("▁")) > MAX_SYLLABLES
    )


def _real_count(pair: tuple[str, str], indexes: set[int], symbols: list[list[str]], weights: list) -> int:
    return sum(weights[i][1] * sum(p == pair for p in zip(symbols[i], symbols[i][1:], strict=False)) for i in indexes)


def _merge(pieces: list[str], pair: tuple[str, str], joined: str) -> list[str]:
    result, i = [], 0
    while i < len(pieces):
        if i + 1 < len(pieces) and pieces[i] == pair[0] and pieces[i + 1] == pair[1]:
            result.append(joined)
            i += 2
        else:
            result.append(pieces[i])
            i += 1
    return result


# writing and checking -----------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    """The tokenizer of a folder. Raises PipelineError where there is none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise PipelineError(f"{folder}: no tokenizer.json there")
    return AutoTokenizer.from_pretrained(folder)


def write_extended(base_folder: Path, folder: Path, extension: Extension) -> None:
    """Write the base tokenizer with the extension appended: `tokenizer.json`, and `tokenizer.model` where there is one.

    New ids follow the last old id; new merges follow all old merges.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"):
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)
    spec = json.loads((base_folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    # Tokens that live only among the added ones (the image token does) would be renumbered to the end of the
    # grown vocabulary at load; inside the vocabulary they keep their ids.
    for token in spec["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    next_id = max(vocab.values()) + 1
    for offset, piece in enumerate(extension.pieces):
        vocab[piece] = next_id + offset
    as_list = bool(spec["model"]["merges"]) and isinstance(spec["model"]["merges"][0], list)
    spec["model"]["merges"] += [list(m) if as_list else " ".join(m) for m in extension.merges]
    records.write_text(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
    if (base_folder / "tokenizer.model").is_file():
        _write_extended_model(base_folder / "tokenizer.model", folder / "tokenizer.model", extension)


def _write_extended_model(source: Path, target: Path, extension: Extension) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    if proto.pieces[-1].piece != IMAGE_TOKEN:  # Gemma's own file ends before the image token's id
        image = proto.pieces.add()
        image.piece, image.score, image.type = IMAGE_TOKEN, 0.0, proto.SentencePiece.USER_DEFINED
    lowest = min(piece.score for piece in proto.pieces)
    for k, text in enumerate(extension.pieces):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, lowest - 1 - k, proto.SentencePiece.NORMAL
    target.write_bytes(proto.SerializeToString())


def check_extended(base: Any, extended: Any, pieces: list[str], samples: list[str]) -> list[str]:
    """What is wrong with an extended tokenizer, in words; empty when every invariant holds.

    samples: texts, some without Hangul; those must encode as before, and all must decode to themselves.
    """
    wrong = []
    old, new = base.get_vocab(), extended.get_vocab()
    moved = [token for token, i in old.items() if new.get(token) != i]
    if moved:
        wrong.append(f"{len(moved)} old ids moved, for instance {moved[0]!r}")
    if sorted(new.values()) != list(range(len(old) + len(pieces))):
        wrong.append("ids are not contiguous")
    if len(extended) != len(base) + len(pieces):
        wrong.append(f"{len(extended)} ids, expected {len(base) + len(pieces)}")
    for piece in pieces:
        if not HANGUL_PIECE.fullmatch(piece) or piece in old:
            wrong.append(f"new piece {piece!r} is not new Hangul")
    unreachable = [p for p in pieces if encode(extended, p.replace("▁", " ")) != [new.get(p)]]
    if unreachable:
        wrong.append(f"{len(unreachable)} new pieces do not encode to themselves, for instance {unreachable[0]!r}")
    for text in samples:
        ids = encode(extended, text)
        if extended.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
            wrong.append(f"does not round-trip: {text[:40]!r}")
        if not re.search("[가-힣]", text) and ids != encode(base, text):
            wrong.append(f"text without Hangul encodes differently: {text[:40]!r}")
    return wrong


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens; a "<bos>" or "<pad>" written in the text is text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def tokens_per_character(tokenizer: Any, texts: Iterable[str]) -> float:
    """Tokens over characters of all texts together; lower is better."""
    tokens = characters = 0
    for text in texts:
        tokens += len(encode(tokenizer, text))
        characters += len(text)
    return tokens / max(characters, 1)


def fingerprint(folder: Path) -> str:
    """sha256 of `tokenizer.json`: stored with adapters and compared when they are loaded."""
    return records.sha256(folder / "tokenizer.json")

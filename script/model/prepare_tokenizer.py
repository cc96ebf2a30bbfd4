"""Extend the base tokenizer for Korean medicine by continuing its own merges over the refined training text.

Reads   model/raw/<model>/, data/02_refined/ (training parts only; never dev, test or validation, but to measure)
Writes  model/tokenizer/<name>/ : tokenizer.json, tokenizer.model where the base has one, new_tokens.txt,
        tokenizer_info.json

    python script/model/prepare_tokenizer.py --model tiny
    python script/model/prepare_tokenizer.py --model tiny --new-tokens auto # none where the verdict says so
    python script/model/prepare_tokenizer.py --model tiny --new-tokens 0    # keep the base vocabulary
    python script/model/prepare_tokenizer.py --model tiny --compare         # beside add_tokens; publishes nothing

What counts for what: plain text is what stage 00 reads, so its words alone say how often a new token will be met there
(the profile's minimum). Exam questions with their options, definitions and the Korean side of the pairs rank the merges
besides, dictionary terms several times over. A --min-count that is given counts occurrences in all of that text, each
once, and not in the plan of stage 00, which may read a part only. Repeated lines count once. Of plain text larger than
the profile's 100 MB a share is read, and the plan is scaled to the whole; a given --min-count is of what was read.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_korean import bpe, cli, prompts, records, shapes, verdict
from medgemma_korean import tokenizer as tokenizers
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.profiles import ModelProfile, StageSettings
from medgemma_korean.stage import RECORD_NAME, Input, Stage, read_record, versions
from medgemma_korean.verdict import Line

FORMAT = 2
SAMPLED = 500  # documents of plain text, drawn by hash, for the invariants and for tokens per character
MIN_SYLLABLE = 20  # occurrences: fewer are typing errors and names; one row of its own must be learned from nothing
MOST_WORDS = 1_000_000  # distinct ones; above, those seen once are left out (65 % of the words, few of the merges)
HELD_OUT_TERMS = 0.05  # share of the dictionary's terms that are kept out of the mix, by hash
COMPARED = 5_000_000  # characters of the mix and of the held-out text that --compare encodes
LIBRARIES = ("tokenizers", "transformers")


# the training mix ---------------------------------------------------------------------------------------


@dataclass
class Mix:
    """Hangul words of the training text, repeated lines once.

    plain: of the text that stage 00 reads, or a share of it. other: exam questions, definitions, Korean of the pairs.
    terms: of the dictionary. characters: of the plain documents that were read. sample: some of these.
    """

    plain: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)
    terms: Counter[str] = field(default_factory=Counter)
    share: float = 1.0
    documents: int = 0
    characters: int = 0
    sample: list[str] = field(default_factory=list)

    def weighted(self, terms_weight: int) -> Counter[str]:
        """What ranks the merges; with a weight of 1 what stands in the whole mix."""
        counts = self.plain.copy()
        counts.update(self.other)
        for word, n in self.terms.items():
            counts[word] += terms_weight * n
        return counts

    @property
    def words(self) -> int:
        """How many distinct ones."""
        return len(self.plain.keys() | self.other.keys() | self.terms.keys())

    @property
    def digest(self) -> str:
        """sha256 of all words and counts: what the merges were learned from."""
        digest = hashlib.sha256()
        for name in ("plain", "other", "terms"):
            counts = getattr(self, name)
            digest.update(f"{name}\n".encode() + b"".join(f"{w}\t{counts[w]}\n".encode() for w in sorted(counts)))
        return digest.hexdigest()


def drawn(file: Path, megabytes: float) -> Iterator[tuple[int, str]]:
    """(hash, text) of the documents of a JSONL file; of a larger file, of those whose hash falls into the share.

    The hash is of a line as it stands, so that what is drawn depends neither on the order nor on the other documents,
    and what is not drawn is not parsed.
    """
    import xxhash

    limit = round(share_of(file, megabytes) * 2**64)
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            key = xxhash.xxh3_64_intdigest(line)
            if key < limit and line.strip():
                try:
                    yield key, records.parse_row(line)["text"]
                except (ValueError, KeyError) as error:
                    raise PipelineError(f"{file}, line {number}: no document ({error})") from None


def share_of(file: Path, megabytes: float) -> float:
    if not file.is_file():
        raise PipelineError(f"{file}: no such file")
    return min(1.0, megabytes * 1e6 / max(file.stat().st_size, 1))


def held_out_term(term: str) -> bool:
    return int.from_bytes(hashlib.sha256(term.encode()).digest()[:8], "big") < HELD_OUT_TERMS * 2**64


def read_mix(paths: RunPaths, profile: ModelProfile) -> Mix:
    """Count the training text. Raises PipelineError when there is none, or no Hangul in it."""
    file = paths.plain_text / "train.jsonl"
    mix = Mix(share=share_of(file, profile.counted_megabytes))
    kept: list[tuple[int, str]] = []  # a heap of the documents with the smallest hashes

    def plain() -> Iterator[str]:
        for key, text in drawn(file, profile.counted_megabytes):
            mix.documents += 1
            mix.characters += len(text)
            if len(kept) < SAMPLED:
                heapq.heappush(kept, (-key, text))
            else:
                heapq.heappushpop(kept, (-key, text))
            yield text

    seen: set[int] = set()
    mix.plain = bpe.count_words(bpe.distinct_lines(plain(), seen))
    if not mix.documents:
        raise PipelineError(f"{show(file)}: no training text to learn merges from")
    if not mix.plain:
        raise PipelineError(f"{show(file)}: no Hangul in {cli.count(mix.documents, 'document')}; is this Korean text?")
    mix.sample = [text for _, text in sorted(kept, reverse=True)]
    entries = [e for e in dictionary(paths) if not held_out_term(e["term"])]
    mix.other = bpe.count_words(bpe.distinct_lines(_other(paths, entries), seen))
    mix.terms = bpe.count_words(bpe.distinct_lines([entry["term"] for entry in entries]))
    return mix


def dictionary(paths: RunPaths) -> list[dict[str, Any]]:
    return records.read_json(paths.dictionary) if paths.dictionary.is_file() else []


def _other(paths: RunPaths, entries: list[dict[str, Any]]) -> Iterator[str]:
    for item in records.read_jsonl(paths.mcq / "train.jsonl"):
        yield f"{item['question']}\n{prompts.options(item)}"
    if paths.pairs.is_dir():
        for row in records.read_jsonl(paths.pairs / "ko_to_en.jsonl"):
            yield row["source"]
    for entry in entries:
        yield entry["definition"]


def held_out(paths: RunPaths) -> tuple[dict[str, list[str]], dict[str, int]]:
    """(held-out texts, characters of the medical ones). Raises PipelineError naming every set that is empty.

    Exam questions are from another site than the plain text. Dictionary terms that the mix does not hold are from a
    third one: "terms", where there is a dictionary.
    """
    terms = [entry["term"] for entry in dictionary(paths) if held_out_term(entry["term"])]
    files = {
        "korean": paths.plain_text / "validation.jsonl",
        "medical": paths.mcq / "dev.jsonl",
        "english": paths.english_replay / "validation.jsonl",
    }
    texts = {
        name: [
            row["text"] if "text" in row else f"{row['question']}\n{prompts.options(row)}"
            for row in records.read_jsonl(file)
        ]
        for name, file in files.items()
    }
    if empty := [f"{show(files[name])}: no held-out {name} text" for name in texts if not "".join(texts[name])]:
        raise PipelineError("\n".join(empty) + "\nWithout it nobody can tell whether the extension helps.")
    medical = {"medical": sum(map(len, texts["medical"]))}
    if terms:
        texts["terms"], medical["terms"] = terms, sum(map(len, terms))
    return texts, medical


# learning and measuring ---------------------------------------------------------------------------------


def planned_passes(settings: StageSettings, mix: Mix, tokenizer: Any) -> float:
    """How often the planned stage 00 reads the documents of the mix, in the mean.

    An epoch takes `max_rows` packed rows of Korean text, each full of `max_length` tokens, <bos> and <eos> among them.
    English replay is added to them and takes nothing away (train_00_plain_text). A tokenizer that needs fewer tokens
    gets more text into the same rows.
    """
    width = settings.max_length - 2
    lengths = [len(tokenizers.encode(tokenizer, text)) for text in mix.sample]
    tokens = sum(n + math.ceil(n / width) + 1 for n in lengths) / sum(map(len, mix.sample)) * mix.characters
    whole = tokens / mix.share
    read = whole if settings.max_rows is None else min(whole, settings.max_rows * settings.max_length)
    return settings.epochs * read / tokens


def learn(base: Any, mix: Mix, profile: ModelProfile, settings: dict[str, Any]) -> bpe.Extension:
    """Continued BPE over the mix; the minimum is of the planned stage 00, or of the mix where one was given."""
    limit = settings["new_tokens"]
    if not limit:
        return bpe.Extension([], [])
    weighted = bpe.without_rare(mix.weighted(settings["medical_weight"]), MOST_WORDS)
    if settings["min_count_in"] == "mix":
        real, min_count = mix.weighted(1), float(settings["min_count"])
    else:
        real, min_count = mix.plain, settings["min_count"] / planned_passes(profile.plain_text, mix, base)
    return bpe.continue_bpe(
        weighted,
        tokenizers.segmenter(base),
        set(base.get_vocab()),
        limit,
        min_count,
        real=real,
        syllable_count=MIN_SYLLABLE,
    )


def uses(extended: Any, pieces: list[str], mix: Mix) -> tuple[list[int], list[int]]:
    """(in the plain text, in the whole mix): how often each new token stands in the words that were counted."""
    segment = tokenizers.segmenter(extended)
    new = set(pieces)
    plain, whole = Counter(), Counter()
    for counts, target in ((mix.plain, plain), (mix.other, whole), (mix.terms, whole)):
        for word, n in counts.items():
            for piece in segment(word):
                if piece in new:
                    target[piece] += n
    return [plain[piece] for piece in pieces], [plain[piece] / mix.share + whole[piece] for piece in pieces]


@dataclass
class Judgement:
    """What was measured of one extension."""

    before: dict[str, float]
    after: dict[str, float]
    use: dict[str, float]
    updates: dict[str, float]
    memory: dict[str, float]
    lines: list[Line]


def judge(base: Any, extended: Any, pieces: list[str], mix: Mix, profile: ModelProfile, paths: RunPaths) -> Judgement:
    texts, medical = held_out(paths)
    before = {name: tokenizers.tokens_per_character(base, t) for name, t in texts.items()}
    after = {name: tokenizers.tokens_per_character(extended, t) for name, t in texts.items()}
    in_plain, in_mix = uses(extended, pieces, mix)
    epochs = profile.plain_text.epochs
    passes = planned_passes(profile.plain_text, mix, extended)
    updates = [n * passes for n in in_plain]
    new_ids = set(extended.convert_tokens_to_ids(pieces))
    met = {i for name in ("korean", "medical") for t in texts[name] for i in tokenizers.encode(extended, t)}
    share_met = len(new_ids & met) / max(len(new_ids), 1)
    shape = shapes.read_shape(profile, paths)
    rows = tokenizers.rows_for(len(extended), at_least=shape.rows)
    memory = verdict.memory(len(extended), rows, shape.rows, shape.hidden, len(pieces))
    lines = [] if pieces else [Line("new tokens", False, "none were asked for, or no merge occurs often enough")]
    lines += verdict.compression_lines(before, after, medical)
    lines += [verdict.use_line([n * epochs for n in in_mix], profile.min_updates, share_met)]
    lines += [verdict.updates_line(updates, profile.min_updates), verdict.memory_line(memory)]
    use = {
        "unused": sum(n == 0 for n in in_mix),
        "used_enough": sum(n * epochs >= profile.min_updates for n in in_mix),
        "enough": profile.min_updates,
        "occur_in_held_out": len(new_ids & met),
    }
    return Judgement(before, after, use, verdict.spread(updates), memory, lines)


def write(profile: ModelProfile, paths: RunPaths, base: Any, folder: Path, extension: bpe.Extension, mix: Mix) -> Line:
    """Write the tokenizer and check every invariant. Raises AssertionError: a violation is a fault of ours."""
    tokenizers.write_extended(paths.raw_model, folder, extension)
    english = [row["text"] for row in records.read_jsonl(paths.english_replay / "validation.jsonl")][:SAMPLED]
    documents = [*mix.sample, *english]
    wrong = tokenizers.violations(paths.raw_model, folder, extension, documents, base)
    ids, old_rows = len(base) + len(extension.pieces), shapes.read_shape(profile, paths).rows
    rows = tokenizers.rows_for(ids, at_least=old_rows)
    if rows % tokenizers.ROW_MULTIPLE or rows < max(ids, old_rows):
        wrong.append(f"{rows:,} rows for {ids:,} ids over {old_rows:,} rows of the base")
    if wrong:
        raise AssertionError("the extended tokenizer is not sound: " + "; ".join(wrong[:5]))
    forms = "" if not (folder / "tokenizer.model").is_file() else ", tokenizer.model agrees"
    return Line(
        "invariants",
        True,
        f"old ids, merges and special tokens stay, also when saved and loaded again; "
        f"{cli.count(len(documents), 'document')} and {tokenizers.RANDOM_TEXTS:,} random strings tried{forms}",
    )


def build(profile: ModelProfile, paths: RunPaths, stage: Stage, settings: dict[str, Any]) -> None:
    tokenizers.read_spec(paths.raw_model)
    base = tokenizers.load(paths.raw_model)
    with stage.work() as folder:
        held_out(paths)  # missing text is told at once, not after the learning
        mix = read_mix(paths, profile)
        stage.tick(1, 4, "learning merges")
        extension = learn(base, mix, profile, settings)
        stage.tick(2, 4, "checking")
        sound = write(profile, paths, base, folder, extension, mix)
        stage.tick(3, 4, "measuring")
        found = judge(base, tokenizers.load(folder), extension.pieces, mix, profile, paths)
        hashes = {
            "base": tokenizers.fingerprint(paths.raw_model),
            "corpus": mix.digest,
            "tokenizer": tokenizers.fingerprint(folder),
        }
        known = {name: version for name, version in versions().items() if name in LIBRARIES}
        origin = verdict.provenance_line(hashes, mix.words, mix.documents, known)
        lines = [*found.lines, sound, verdict.NOT_RUN, origin]
        word, reason = verdict.decide(lines)
        log.info("%s", verdict.report(lines, word, reason))
        tried = len(extension.pieces)
        if word == verdict.DO_NOT_EXTEND and tried and settings["auto"]:
            log.info("the base vocabulary is kept (--new-tokens auto)")
            extension = bpe.Extension([], [])
            write(profile, paths, base, folder, extension, mix)
            hashes["tokenizer"] = tokenizers.fingerprint(folder)
            found = judge(base, tokenizers.load(folder), [], mix, profile, paths)
        elif word == verdict.DO_NOT_EXTEND and tried:
            stage.warnings.append(f"tokenizer verdict: {word} ({reason})")
        pieces = extension.pieces
        records.write_text(folder / "new_tokens.txt", "".join(f"{piece}\n" for piece in pieces))
        records.write_json(
            folder / "tokenizer_info.json",
            {
                "base_vocab": len(base),
                "new_tokens": len(pieces),
                "new_syllables": len(extension.syllables),
                "vocab": len(base) + len(pieces),
                "rows": found.memory["rows"],
                "tokens_per_character": {"base": found.before, "extended": found.after},
                "use": found.use,
                "updates": found.updates,
                "verdict": word,
                "reason": reason,
                "lines": [line.as_dict() for line in lines],  # of the extension that was tried, published or not
                "tried": tried,
                "hashes": hashes,
                "memory": found.memory,
            },
        )
        change = found.after["medical"] / found.before["medical"] - 1
        stage.complete(
            counts={"new_tokens": len(pieces), "documents": mix.documents, "words": mix.words},
            scores={"before": found.before, "after": found.after},
            metric=f"{len(pieces):,} new tokens, medical text {change:+.1%} tokens",
        )


# comparison ---------------------------------------------------------------------------------------------


def compare(profile: ModelProfile, paths: RunPaths, settings: dict[str, Any], words_file: str | None) -> None:
    """Print base, `add_tokens` of the same words, and continued BPE side by side."""
    texts, _ = held_out(paths)
    mix = read_mix(paths, profile)
    base = tokenizers.load(paths.raw_model)
    with tempfile.TemporaryDirectory() as temporary:
        glued_folder, learned_folder = Path(temporary) / "glued", paths.tokenizer
        if read_record(paths.tokenizer / RECORD_NAME) is not None:
            file = paths.tokenizer / "new_tokens.txt"
            pieces = tokenizers.read_words(file) if file.stat().st_size else []
            log.info("comparing with %s", show(paths.tokenizer))
        else:
            learned_folder = Path(temporary) / "learned"
            extension = learn(base, mix, profile, settings)
            write(profile, paths, base, learned_folder, extension, mix)
            pieces = extension.pieces
        asked = tokenizers.read_words(Path(words_file)) if words_file else pieces
        words = list(dict.fromkeys(piece.lstrip("▁") for piece in asked if piece != "▁"))
        glued = tokenizers.load(paths.raw_model)
        glued.add_tokens(words)
        glued.save_pretrained(glued_folder)
        candidates = {
            "base": (paths.raw_model, []),
            "add_tokens": (glued_folder, words),
            "continued BPE": (learned_folder, pieces),
        }
        columns = {name: measured(base, *about, texts, mix) for name, about in candidates.items()}
    rows = [[what, *(column[what] for column in columns.values())] for what in columns["base"]]
    log.info("%s", cli.table(rows, ["", *columns]))


def measured(base: Any, folder: Path, pieces: list[str], texts: dict[str, list[str]], mix: Mix) -> dict[str, str]:
    """What --compare shows of one tokenizer."""
    begun = time.perf_counter()
    tokenizer = tokenizers.load(folder)
    seconds = time.perf_counter() - begun
    found = {"token ids": f"{len(tokenizer):,}", "of them new": f"{len(tokenizer) - len(base):,}"}
    for name, some in texts.items():
        found[f"tokens per character, {name}"] = f"{tokenizers.tokens_per_character(tokenizer, some):.3f}"
    new = tokenizer.convert_tokens_to_ids(pieces)
    some = _first(mix.sample, COMPARED)
    met = {i for text in some for i in tokenizers.encode(tokenizer, text)}
    found["new tokens unused in a sample"] = f"{sum(i not in met for i in new) / len(new):.1%}" if new else "-"
    english = [*texts["english"], *tokenizers.CODE]
    same = all(tokenizers.encode(tokenizer, text) == tokenizers.encode(base, text) for text in english)
    found["English and code as in the base"] = "yes" if same else "NO"
    alone = [tokenizers.encode(tokenizer, piece.replace("▁", " ")) for piece in pieces]
    found["new tokens not encoded to themselves"] = str(sum(ids != [i] for ids, i in zip(alone, new, strict=True)))
    found["seconds to load"] = f"{seconds:.2f}"
    speed = _first(texts["korean"], COMPARED)
    begun = time.perf_counter()
    for text in speed:
        tokenizers.encode(tokenizer, text)
    size = sum(len(text.encode()) for text in speed)
    found["MB/s, Korean"] = f"{size / 1e6 / (time.perf_counter() - begun):.2f}"
    return found


def _first(texts: list[str], characters: int) -> list[str]:
    kept, room = [], characters
    for text in texts:
        if room <= 0:
            break
        kept.append(text)
        room -= len(text)
    return kept


# command line -------------------------------------------------------------------------------------------


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--new-tokens", type=cli.token_number, metavar="N", help="most new tokens; 0: none; auto: none if the verdict is no"
    )
    parser.add_argument(
        "--min-count",
        type=cli.positive_int,
        metavar="N",
        help="times the training text must hold a new token (default: the profile's, met by the planned stage 00)",
    )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add_size_arguments(parser)
    parser.add_argument("--compare", action="store_true", help="print base, add_tokens and continued BPE side by side")
    parser.add_argument("--words", metavar="FILE", help="with --compare: the words for add_tokens, one a line")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    profile, paths = cli.resolve(args)
    if args.words and not args.compare:
        raise PipelineError("--words goes with --compare; what is learned comes from the training text; add --compare")
    cli.start_logging(paths, "prepare_tokenizer")
    stage_00, auto = profile.plain_text, args.new_tokens == "auto"
    settings = {
        "new_tokens": profile.new_tokens if auto or args.new_tokens is None else args.new_tokens,
        "auto": auto,
        "min_count": args.min_count or profile.min_count,
        "min_count_in": "mix" if args.min_count else "stage 00",
        "medical_weight": profile.medical_weight,
        "counted_megabytes": profile.counted_megabytes,
        "epochs": stage_00.epochs,
        "max_rows": stage_00.max_rows,
        "max_length": stage_00.max_length,
    }
    refine = paths.command("refine/refine_all")
    stage = Stage(
        "prepare_tokenizer",
        paths,
        outputs=[paths.tokenizer],
        inputs=[
            raw_model_input(paths),
            Input("plain text", paths.plain_text, paths.record("refine_00_plain_text"), refine),
            Input("exam questions", paths.mcq, paths.record("refine_02_kor_med_test"), refine),
            Input("dictionary", paths.dictionary, paths.record("refine_01_medical_dict"), optional=True),
            Input("pairs", paths.pairs, paths.record("refine_01_english_korean"), optional=True),
        ],
        settings=settings,
        format=FORMAT,
        force=args.force,
        record_inside=True,
    )
    if args.compare:
        stage.identity()  # names what is missing
        compare(profile, paths, settings, args.words)
        return 0
    if (code := stage.already_complete()) is not None:
        return code
    build(profile, paths, stage, settings)
    return 0


def raw_model_input(paths: RunPaths) -> Input:
    repair = paths.command("download/download_model")
    return Input("raw model", paths.raw_model, paths.raw_model / "stage.json", repair)


if __name__ == "__main__":
    sys.exit(cli.run(main))

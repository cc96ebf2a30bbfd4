"""How long a tokenizer of Gemma's size takes to be extended, to load and to encode: the base beside the extended one.

Reads   nothing: text and base are made from a seed (raw_mix.py)
Writes  a table to stdout, with --json the numbers; its files (three times --mb) go into --folder and are removed

    .venv/bin/python tests/bench/bench_tokenizer.py                   # 100 MB, 262,145 ids, 10,000 new ones: 10 minutes
    .venv/bin/python tests/bench/bench_tokenizer.py --mb 2 --pieces 2000 --ids 20000 --tokens 500

The text is raw_mix's Korean with every twelfth word made of the halves of two others, so that as many words occur once
as in real text. The base is a SentencePiece model of --pieces pieces trained on a part of it, padded to --ids with
pieces that join two others of the Latin alphabet, with every split of a piece as a merge, as transformers converts
Gemma's. Learning runs in a process of its own, by the functions of prepare_tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import raw_mix  # beside this file
from bench_refine import measured

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "medgemma-4b"  # whose profile says how much is counted
RARE = 12  # every such word is a new one
TRAINED_MB = 6  # of each language, that the base's pieces are trained on
MIN_COUNT = 40  # in 100 MB: what 100 in the planned stage 00 of the real models comes to
CONSONANTS, VOWELS = "bcdfghklmnprstvwz", "aeiou"


# made text ------------------------------------------------------------------------------------------------


def korean(seed: int, megabytes: float) -> Iterator[str]:
    """Pages of made Korean text."""
    writer, rng, room = raw_mix.Writer(seed), random.Random(seed), megabytes * 1e6
    sources = [writer.pages("wikipedia-korean"), writer.pages("c4_korean")]
    words = writer.vocabulary.tolist()
    while room > 0:
        page = next(sources[rng.randrange(2)]).split(" ")
        for at in range(rng.randrange(RARE), len(page), RARE):
            page[at] = rng.choice(words)[:3].strip(".,") + rng.choice(words)[-3:]
        text = " ".join(page)
        room -= len(text.encode())
        yield text


def latin(seed: int, megabytes: float) -> Iterator[str]:
    """Lines of made words of the Latin alphabet, frequent ones first among equals as in real text."""
    rng, room = random.Random(seed), megabytes * 1e6
    words = [
        "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 5))) for _ in range(60_000)
    ]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    while room > 0:
        line = " ".join(rng.choices(words, weights, k=200))
        room -= len(line)
        yield line


def make_base(folder: Path, pieces: int, ids: int, megabytes: float, seed: int) -> dict:
    """A tokenizer of `ids` ids in both forms; says how many merges it has."""
    from sentencepiece import sentencepiece_model_pb2

    from medgemma_korean import tokenizer as tokenizers

    texts = [*korean(seed + 1, megabytes), *latin(seed, megabytes)]
    tokenizers.build_base(folder, (text[i : i + 2000] for text in texts for i in range(0, len(text), 2000)), pieces)
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    image = proto.pieces.pop()
    known = {piece.piece for piece in proto.pieces}
    parts = [p for p in known if 2 <= len(p) <= 8 and p.isascii() and p.isalpha()]
    parts.sort()
    rng, score = random.Random(seed), min(piece.score for piece in proto.pieces)
    while len(proto.pieces) < ids - 1:
        joined = rng.choice(parts) + rng.choice(parts)
        if joined not in known:
            known.add(joined)
            score -= 1
            piece = proto.pieces.add()
            piece.piece, piece.score, piece.type = joined, score, proto.SentencePiece.NORMAL
    proto.pieces.append(image)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizers.convert(proto, folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {"ids": len(tokenizers.load(folder)), "merges": len(spec["model"]["merges"])}


def make(root: Path, args: argparse.Namespace) -> dict:
    """A project with the text as refined data, and the base as its raw model."""
    from medgemma_korean import records

    paths = run_paths(root)
    writer = raw_mix.Writer(args.seed)
    items = [writer.exam_item(number) for number in range(1000)]
    records.write_jsonl(paths.mcq / "train.jsonl", items[:800])
    records.write_jsonl(paths.mcq / "dev.jsonl", items[800:])
    for file, texts in (
        (paths.plain_text / "train.jsonl", korean(args.seed, args.mb)),
        (paths.plain_text / "validation.jsonl", korean(args.seed + 2, args.mb / 50)),
        (paths.english_replay / "validation.jsonl", latin(args.seed + 3, args.mb / 50)),
    ):
        records.write_jsonl(file, ({"text": text} for text in texts))
    return make_base(paths.raw_model, args.pieces, args.ids, min(TRAINED_MB, args.mb), args.seed)


def run_paths(root: Path):
    from medgemma_korean.paths import RunPaths

    os.environ["MEDGEMMA_KOREAN_ROOT"] = str(root)
    return RunPaths.of(MODEL, "data")


# what is measured -----------------------------------------------------------------------------------------


def learn(root: Path, args: argparse.Namespace) -> dict:
    """Count, learn, write and check, as prepare_tokenizer does."""
    sys.path.insert(0, str(REPOSITORY / "script" / "model"))
    from medgemma_korean import profiles
    from medgemma_korean import tokenizer as tokenizers

    import prepare_tokenizer

    paths, profile = run_paths(root), profiles.get(MODEL)
    settings = {"new_tokens": args.tokens, "min_count": args.min_count, "min_count_in": "mix", "medical_weight": 5}
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    base = tokenizers.load(paths.raw_model)
    seconds = {"load the base": lap()}
    mix = prepare_tokenizer.read_mix(paths, profile)
    seconds["read and count"] = lap()
    extension = prepare_tokenizer.learn(base, mix, profile, settings)
    seconds["learn"] = lap()
    if args.alone == "learn":
        tokenizers.write_extended(paths.raw_model, paths.tokenizer, extension)
        seconds["write"] = lap()
    else:
        prepare_tokenizer.write(profile, paths, base, paths.tokenizer, extension, mix)
        seconds["write and check"] = lap()
        judged = prepare_tokenizer.judge(base, tokenizers.load(paths.tokenizer), extension.pieces, mix, profile, paths)
        seconds["measure"] = lap()
        assert judged.after["medical"] < judged.before["medical"]
    return {"seconds": seconds, "new": len(extension.pieces), "words": mix.words, "characters": mix.characters}


def compare(root: Path, rounds: int) -> dict:
    """Loading and encoding, base and extended in turn, each round in the opposite order of the last."""
    from medgemma_korean import records
    from medgemma_korean import tokenizer as tokenizers

    paths = run_paths(root)
    folders = {"base": paths.raw_model, "extended": paths.tokenizer}
    texts = {
        "Korean": [row["text"] for row in records.read_jsonl(paths.plain_text / "validation.jsonl")],
        "Latin": [row["text"] for row in records.read_jsonl(paths.english_replay / "validation.jsonl")],
    }
    found: dict[str, dict[str, list[float]]] = {}

    def note(what: str, which: str, value: float) -> None:
        found.setdefault(what, {name: [] for name in folders})[which].append(value)

    loaded = {}
    for number in range(rounds):
        for which in sorted(folders, reverse=bool(number % 2)):
            begun = time.perf_counter()
            loaded[which] = tokenizers.load(folders[which])
            note("load, s", which, time.perf_counter() - begun)
        for language, some in texts.items():
            size = sum(len(text.encode()) for text in some) / 1e6
            for which in sorted(folders, reverse=bool(number % 2)):
                tokenizer = loaded[which]
                begun = time.process_time()
                tokens = sum(len(tokenizers.encode(tokenizer, text)) for text in some)
                note(f"encode {language}, MB/s", which, size / (time.process_time() - begun))
                begun = time.process_time()
                tokenizer.backend_tokenizer.encode_batch_fast(some, add_special_tokens=False)
                note(f"encode_batch_fast {language}, MB/s", which, size / (time.process_time() - begun))
                characters = sum(map(len, some))
                note(f"tokens per character, {language}", which, tokens / characters)
    return {what: {name: statistics.median(v) for name, v in both.items()} for what, both in found.items()}


# command line ---------------------------------------------------------------------------------------------


def table(numbers: dict) -> str:
    lines = ["| what | base | extended | extended / base |", "|---|---|---|---|"]
    for what, both in numbers["compare"].items():
        ratio = both["extended"] / both["base"]
        lines.append(f"| {what} | {both['base']:.3g} | {both['extended']:.3g} | {ratio:.2f} |")
    lines += ["", "| process | seconds | of them | CPU s | RSS MB | RssAnon MB |", "|---|---|---|---|---|---|"]
    for name in ("learn", "whole"):
        run = numbers[name]
        parts = ", ".join(f"{what} {value:.1f}" for what, value in run["seconds"].items())
        memory = f"{run['rss'] / 1e6:,.0f} | {run['anonymous'] / 1e6:,.0f}"
        lines.append(f"| {name} | {run['wall']:.1f} | {parts} | {run['cpu']:.1f} | {memory} |")
    made, run = numbers["made"], numbers["learn"]
    head = f"{made['ids']:,} ids, {made['merges']:,} merges; {run['words']:,} distinct words; {run['new']:,} new tokens"
    return "\n".join([head, "", *lines])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100, help="megabytes of text (default: 100)")
    parser.add_argument("--tokens", type=int, default=10_000, help="new tokens (default: 10,000)")
    parser.add_argument("--min-count", type=int, default=MIN_COUNT, help=f"of a new token (default: {MIN_COUNT})")
    parser.add_argument("--pieces", type=int, default=32_000, help="trained pieces of the base (default: 32,000)")
    parser.add_argument("--ids", type=int, default=262_145, help="ids of the base (default: 262,145)")
    parser.add_argument("--rounds", type=int, default=5, help="of loading and encoding (default: 5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where files go for the time being (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--alone", choices=("learn", "whole"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
    if args.alone:
        print(json.dumps(learn(args.folder, args)))
        return
    root = Path(tempfile.mkdtemp(prefix="bench-tokenizer-", dir=args.folder))
    try:
        numbers: dict = {"made": make(root, args)}
        for name in ("learn", "whole"):
            shutil.rmtree(root / "model" / "tokenizer", ignore_errors=True)
            command = [sys.executable, __file__, "--alone", name, "--folder", str(root)]
            command += ["--tokens", str(args.tokens), "--min-count", str(args.min_count)]
            run = measured(command, dict(os.environ))
            about = {"wall": run.wall, "cpu": run.cpu, "rss": run.rss, "anonymous": run.anonymous}
            numbers[name] = about | run.found
        numbers["compare"] = compare(root, args.rounds)
    finally:
        shutil.rmtree(root)
    print(table(numbers))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

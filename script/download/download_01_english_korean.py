"""Get Korean-English sentence pairs, or check what is already there.

Reads   OPUS Tatoeba (a zip of two aligned files); with --source other sets of pairs of the catalogue
Writes  data/01_raw/03_korean_english/<source>/train.jsonl : {"en", "ko"}; the archive in data/01_raw/.published/

    python script/download/download_01_english_korean.py --model medgemma-4b
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from medgemma_korean import cli, hub, records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.sources import BY_KEY, SOURCES
from medgemma_korean.stage import Input, Stage

FORMAT = 1
MOST = 4e9  # bytes of an unpacked member; the largest OPUS corpus of these languages is a quarter of it
KNOWN = [s.key for s in SOURCES if s.kind == "translation" and s.stage == "01" and s.place != "manual"]
COLUMNS = (("en", "english"), ("ko", "non_english"))  # ours, then the hub set's


def published(paths: RunPaths, key: str) -> Path:
    """Where an archive stays as it was published; readers of 01_raw do not look there."""
    return paths.raw / ".published" / key


def wanted(args: argparse.Namespace, paths: RunPaths) -> list[hub.Want]:
    """The named sources, else those begun, else the default one where nobody put pairs of their own."""
    named = getattr(args, "source", None) or []
    if unknown := [key for key in named if key not in KNOWN]:
        raise PipelineError(f"--source {', '.join(unknown)}: unknown; known are {', '.join(KNOWN)}")
    begun = [key for key in KNOWN if hub.pin(paths, BY_KEY[key]).is_file()]
    if not named and not begun and not (paths.raw_pairs.exists() and records.row_files(paths.raw_pairs)):
        named = [key for key in KNOWN if BY_KEY[key].default]
    again = [o for key in getattr(args, "source", None) or [] for o in ("--source", key)]
    return [
        hub.want(
            paths,
            BY_KEY[key],
            # Hub shards are rows already; archives are kept as published and unpacked.
            published(paths, key) if BY_KEY[key].place == "url" else paths.raw / BY_KEY[key].folder,
            "download_01_english_korean",
            *again,
        )
        for key in KNOWN
        if key in {*named, *begun}
    ]


def read_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files in a zip or tar.gz. Raises PipelineError for a damaged one."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for member in file.infolist():
                    if not member.is_dir():
                        _require_size(archive, member.filename, member.file_size)
                        yield member.filename, file.read(member)
        else:
            with tarfile.open(archive) as file:
                for member in file:
                    if member.isfile():  # no link, no device
                        _require_size(archive, member.name, member.size)
                        yield member.name, file.extractfile(member).read()
    # RuntimeError: encrypted, or in a compression that is not known (NotImplementedError)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError) as error:
        # tarfile goes on with what each compression thinks of it
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise PipelineError(
            f"{show(archive)}: damaged archive ({reason}); delete it, and the same command fetches it again"
        ) from None


def _require_size(archive: Path, name: str, size: int) -> None:
    """Refuse what would fill the memory when it is unpacked. Raises PipelineError."""
    if size > MOST:
        what = f"{cli.size_text(size)}, more than {cli.size_text(MOST)}"
        raise PipelineError(f"{show(archive)}: {name[:100]!r} unpacks to {what}; it is no corpus of sentence pairs")


def aligned(archive: Path) -> tuple[list[str], list[str]]:
    """The English and the Korean lines of an archive of two files, aligned by line.

    Raises PipelineError when there is not one file of each language, when it is not UTF-8, or when the numbers of
    lines differ.
    """
    sides: dict[str, list[str]] = {}
    names = []
    for name, content in read_members(archive):
        names.append(name)
        language = name.rpartition(".")[2]
        if language in ("en", "ko") and not name.rpartition("/")[2].startswith("."):  # "._x.en": what macOS adds
            if language in sides:
                raise PipelineError(f"{show(archive)}: two files end in .{language}; expected one")
            try:
                # Not splitlines(): it breaks at form feeds and U+2028, and the other side would not follow.
                sides[language] = content.decode("utf-8-sig").removesuffix("\n").split("\n")
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                raise PipelineError(f"{show(archive)}, {name}, line {line}: not UTF-8") from None
    if sides.keys() != {"en", "ko"}:
        raise PipelineError(f"{show(archive)}: needs a file ending in .en and one in .ko; it holds {', '.join(names)}")
    if len(sides["en"]) != len(sides["ko"]):
        raise PipelineError(
            f"{show(archive)}: {len(sides['en']):,} English and {len(sides['ko']):,} Korean lines; they are not aligned"
        )
    return sides["en"], sides["ko"]


def archive_in(folder: Path, origin: dict) -> Path:
    """The archive of a source: the one that was fetched, or the one that somebody put there. Raises PipelineError."""
    names = origin.get("files") or sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if len(names) != 1:
        raise PipelineError(f"{show(folder)}: expected one archive, found {', '.join(names)}")
    return folder / next(iter(names))


def unpack(archive: Path, target: Path) -> int:
    """Write the pairs of an archive as `target`/train.jsonl; returns how many."""
    pairs = ({"en": en.strip(), "ko": ko.strip()} for en, ko in zip(*aligned(archive), strict=True))
    return records.write_jsonl(target / "train.jsonl", (p for p in pairs if p["en"] and p["ko"]))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--source", action="append", metavar="KEY", help=f"one of {', '.join(KNOWN)}; may be repeated")
    hub.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    _, paths = cli.resolve(args)
    cli.start_logging(paths, "download_01_english_korean")
    wants = wanted(args, paths)
    origins, changed = hub.ensure(wants, args, paths, "download_01_english_korean")
    changed |= hub.altered(paths.record("download_01_english_korean"), args.force)
    for want in (w for w in wants if w.source.place == "url"):
        target = paths.raw / want.source.folder
        if changed or not (target / "train.jsonl").is_file():
            try:
                pairs = unpack(archive_in(want.target, origins[want.source.key]), target)
            except PipelineError as error:
                raise PipelineError(f"{error}\nFor a newer version: {want.again} --update") from None
            log.info("%s: %s", show(target), cli.count(pairs, "pair"))
    stage = Stage(
        "download_01_english_korean",
        paths,
        outputs=[paths.raw_pairs],
        inputs=[Input("sentence pairs", paths.raw_pairs)],
        settings={},
        format=FORMAT,
        force=args.force or changed,
    )
    if (code := stage.already_complete()) is not None:
        return code
    with stage.work():
        counts = {}
        for file in records.row_files(paths.raw_pairs):
            for row in islice(records.read_rows(file), 3):
                if not all(any(isinstance(row.get(name), str) for name in names) for names in COLUMNS):
                    raise PipelineError(
                        f'{show(file)}: needs the columns "en" and "ko"; found {", ".join(row)}; rename them'
                    )
            counts[file.parent.name] = counts.get(file.parent.name, 0) + 1
            log.info("%s: readable", show(file))
        stage.complete(counts=counts, origins=origins)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

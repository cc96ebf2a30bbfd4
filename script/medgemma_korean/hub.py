"""What is fetched, from where, and in words why it cannot be: pinned revisions, one summary, every failure explained.

A source's revision and file list are resolved once and kept as its pin (`01_raw/.stages/origins/<key>.json`), which
later runs reuse until `--update`. Files go into a hidden neighbour of their folder, which is renamed when it is whole.

    origins, changed = hub.ensure([hub.want(paths, source, folder, "download_00_plain_text")], args, paths, program)
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medgemma_korean import cli, progress, records, sources
from medgemma_korean.cli import PipelineError, log, size_text
from medgemma_korean.paths import RunPaths, show
from medgemma_korean.sources import Source
from medgemma_korean.stage import check_outputs
from medgemma_korean.transfer import Altered, File, Transfer, finished, patiently, quiet_library, reason

RESERVE = 200e6  # bytes of the disk that a download leaves free, for records and logs
MAX_GB = 3.0  # of a source that is taken in part: as much as Korean Wikipedia and NamuWiki, raw
API_TIMEOUT = 30  # seconds without an answer from the hub's API
CONNECTIONS = 8  # files at once; one connection rarely fills a line, and small files wait for answers
# Another address for the hosts of sources that are no hub repositories (OPUS, GitHub): a mirror, with the same paths.
MIRROR_VARIABLE = "MEDGEMMA_KOREAN_URL_MIRROR"

_fetched: list[int] = []
_shown: set[tuple[str, int]] = set()
_resolved: set[Path] = set()  # pins that this process has asked the hub for


class Garbled(Exception):
    """The answer is none that a hub gives."""


class Unreachable(PipelineError):
    """No connection, or a token that is none: asking for the next source is pointless."""


@dataclass(frozen=True)
class Want:
    """A source and where it goes. pin: where its revision and file list are kept. again: the command that repeats it.

    into: a folder to fill that somebody else publishes; by default a hidden neighbour of target, renamed at the end.
    """

    source: Source
    target: Path
    pin: Path
    again: str
    into: Path | None = None

    @property
    def partial(self) -> Path:
        return self.into or self.target.with_name(f".{self.target.name}.partial")


@dataclass
class Plan:
    """What one want needs: origin as in the pin (None for a folder that a person filled), missing file names."""

    want: Want
    origin: dict[str, Any] | None
    missing: list[str] = field(default_factory=list)
    rebuild: bool = False  # the folder is not there yet, or holds another selection or other content
    changed: bool = False  # --update or --max-gb brought another list than before

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.origin["files"] if self.origin else {}

    @property
    def size(self) -> int:
        return sum(f["size"] for f in self.files.values())

    @property
    def needed(self) -> int:
        """Bytes that are still to be fetched, parts that are there deducted."""
        return sum(max(f.size - _size(f.part(self.want.partial)), 0) for f in map(self.file, self.missing))

    def file(self, name: str) -> File:
        entry, source = self.files[name], self.want.source
        if source.place == "url":
            # Its sha256 was computed here and never announced: a new copy need not have that of a damaged one.
            # Should the file change between two attempts, If-Range has it sent whole instead of a piece of another.
            version = entry.get("etag") or entry.get("last-modified")
            headers = {"Accept-Encoding": "identity"} | ({"If-Range": version} if version else {})
            return File(name, entry["size"], _with_login(entry["url"]), headers)
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        known = {k: entry[k] for k in ("sha256", "git") if entry.get(k)}
        url = hf_hub_url(source.id, name, repo_type=repo_type(source), revision=self.origin["revision"])
        return File(name, entry["size"], url, headers, **known)


def repo_type(source: Source) -> str:
    return "model" if source.kind == "model" else "dataset"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def page(source: Source) -> str:
    """The address where a person reads about the source and accepts its terms."""
    if source.place != "hub":
        return source.id
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'' if source.kind == 'model' else 'datasets/'}{source.id}"


def add_options(parser: argparse.ArgumentParser, max_gb: bool = False) -> None:
    """The options that the download programs share."""
    parser.add_argument(
        "--update", action="store_true", help="take the newest published revision instead of the pinned"
    )
    parser.add_argument(
        "--connections",
        type=cli.positive_int,
        default=CONNECTIONS,
        metavar="N",
        help=f"files at once (default: {CONNECTIONS})",
    )
    if max_gb:
        parser.add_argument(
            "--max-gb",
            type=cli.positive_float,
            metavar="X",
            help=f"of each plain-text source at most X GB, in whole files (default: {MAX_GB:g})",
        )


def shared_options(args: argparse.Namespace, max_gb: bool = False) -> list[str]:
    """These options of a parsed command line, to hand to another program."""
    argv = ["--connections", str(args.connections)] + (["--update"] if args.update else [])
    return argv + (["--max-gb", str(args.max_gb)] if max_gb and args.max_gb else [])


# before -------------------------------------------------------------------------------------------------


def pin(paths: RunPaths, source: Source) -> Path:
    """Where a source's revision and file list are kept, beside the stage records of the data folder."""
    return paths.raw / ".stages" / "origins" / f"{source.key}.json"


def want(paths: RunPaths, source: Source, target: Path, program: str, *options: str) -> Want:
    """A want of a data program; the options are those that repeat it."""
    return Want(source, target, pin(paths, source), paths.command(f"download/{program}", *options))


def ensure(
    wanted: list[Want], args: argparse.Namespace, paths: RunPaths, program: str, stage: str = ""
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Survey and fetch; returns origins by key for the stage record, and whether --update or --max-gb changed any.

    stage: the name of the stage that records them, where that is not the program's.
    """
    plans = survey(wanted, args)
    origins = {plan.want.source.key: fetch(plan, args, paths, program) for plan in plans}
    # Compared with the record too: a kill may come after the files were changed and before that was recorded.
    record = paths.record(stage or program)
    recorded = records.read_json(record) if record.is_file() else {}
    renewed = [
        key
        for key, origin in recorded.get("origins", {}).items()
        if "files" in origin and "files" in origins.get(key, {}) and _announced(origin) != _announced(origins[key])
    ]
    return origins, bool(renewed) or any(plan.changed for plan in plans)


def survey(wanted: list[Want], args: argparse.Namespace) -> list[Plan]:
    """Ask the hub what is not pinned, say in one table what will be fetched, and refuse before a byte is.

    Raises PipelineError with all problems at once: terms not accepted, renamed repositories, no space.
    """
    plans, problems = [], []
    for want in wanted:
        try:
            with in_words(want):
                plans.append(_plan(want, args))
        except Unreachable:
            raise
        except PipelineError as error:
            problems.append(str(error))
    _show_summary(plans)
    problems += _space_problems(plans)
    if problems:
        raise PipelineError("\n".join(problems))
    return plans


def read_pin(file: Path) -> dict[str, Any] | None:
    """The pin of a source; None where there is none. Raises PipelineError for what is no pin."""
    if not file.is_file():
        return None
    repair = "it is no record of a download; move it away, and the source is asked for anew"
    known = records.read_object(file, "revision", "files", repair=repair)
    if not isinstance(known["files"], dict) or not all(
        isinstance(e, dict) and "size" in e for e in known["files"].values()
    ):
        raise PipelineError(f"{file}: {repair}")
    return known


def _plan(want: Want, args: argparse.Namespace) -> Plan:
    known = read_pin(want.pin)
    _require_inside(want, known)
    if known is None and want.into is None and want.target.is_dir() and any(want.target.iterdir()):
        return Plan(want, None)
    asked = getattr(args, "max_gb", None)
    most = asked or (known or {}).get("max_gb") or MAX_GB
    if known is None or (args.update and want.pin not in _resolved) or (asked and known["max_gb"] != asked):
        revision = known["revision"] if known and not args.update else want.source.revision
        found = resolve(want, revision, most)
        if known is None or _announced(known) != _announced(found):
            found["pending"] = True
            _forget_changed(want, known, found)
        else:
            found |= {key: known[key] for key in ("files", "pending") if key in known}
        _resolved.add(want.pin)
        records.write_json(want.pin, found)
        known = found
    plan = Plan(want, known, changed=bool(known.get("pending")) and want.target.is_dir())
    published = want.target.is_dir() and (want.into is None or (want.target / "stage.json").is_file())
    # An altered file in place is the stage record's to find; --force fetches it again.
    if published and not plan.changed and not args.force and all((want.target / name).is_file() for name in plan.files):
        return plan
    plan.missing = [
        name
        for name, entry in plan.files.items()
        if not _same(want.partial / name, entry) and not _same(want.target / name, entry, hashed=True)
    ]
    plan.rebuild = not published or bool(plan.missing) or (plan.changed and not _holds(want.target, plan.files))
    return plan


def _require_inside(want: Want, origin: dict[str, Any] | None) -> None:
    """Raise PipelineError where a list of files, of a hub or of a pin, names one outside the folder it goes to."""
    for name in (origin or {}).get("files", {}):
        records.require_inside(name, want.source.id)


def _announced(origin: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files as the hub lists them, without the sha256 that was computed here."""
    own = {name for name, entry in origin["files"].items() if "git" in entry or "url" in entry}
    return {
        name: {k: v for k, v in entry.items() if k != "sha256" or name not in own}
        for name, entry in origin["files"].items()
    }


def _forget_changed(want: Want, known: dict[str, Any] | None, found: dict[str, Any]) -> None:
    """Remove fetched files of a broken-off download that the new revision holds with other content.

    Without a pin, which somebody may have removed, their hashes tell.
    """
    new = _announced(found)
    for name, entry in (_announced(known) if known else new).items():
        if new.get(name) != entry if known else not _same(want.partial / name, entry, hashed=True):
            (want.partial / name).unlink(missing_ok=True)


def _same(path: Path, entry: dict[str, Any], hashed: bool = False) -> bool:
    if _size(path) != entry["size"] or not path.is_file():
        return False
    if not hashed:
        return True
    if entry.get("sha256"):
        return records.sha256_once(path) == entry["sha256"]
    if entry.get("git"):
        return hashlib.sha1(b"blob %d\0" % entry["size"] + path.read_bytes()).hexdigest() == entry["git"]
    return True


def _holds(folder: Path, files: dict[str, dict[str, Any]]) -> bool:
    """These files and no other, by their hashes: a kill came after they were put in place."""
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return there == set(files) and all(_same(folder / name, entry, hashed=True) for name, entry in files.items())


def resolve(want: Want, revision: str | None, max_gb: float) -> dict[str, Any]:
    """The pin of a source: id, revision (a commit), licence, and its files with size and hash, as published now.

    Raises PipelineError when no file matches, and what huggingface_hub raises.
    """
    source = want.source
    with quiet_library():
        found = _resolve_url(want) if source.place == "url" else _resolve_repository(want, revision)
    chosen, total = {}, 0
    for name, entry in sorted(found.pop("files").items()):
        if chosen and source.kind == "plain text" and total + entry["size"] > max_gb * 1e9:
            continue
        total += entry["size"]
        chosen[name] = entry
    _require_inside(want, {"files": chosen})
    if source.kind == "plain text" and total > max_gb * 1e9:
        log.warning(
            "%s: its file of %s is more than --max-gb %g, and is fetched whole", source.key, size_text(total), max_gb
        )
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = {"key": source.key, "id": source.id, "licence": source.licence, "resolved": now, "max_gb": max_gb}
    return about | found | {"files": chosen}


def _resolve_repository(want: Want, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    source, api, kind = want.source, HfApi(), repo_type(want.source)

    def once(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        _session()
        try:
            found = call(source.id, *arguments, repo_type=kind, **options)
            return list(found) if isinstance(found, Iterator) else found
        except (AttributeError, KeyError, TypeError) as error:  # the library takes what the answer should hold
            raise Garbled(str(error)) from error

    def ask(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return patiently(lambda: once(call, *arguments, **options), source.id)

    def listed(folder: str, recursive: bool = False) -> list[Any]:
        """The library itself asks again for a page that does not come."""
        return once(api.list_repo_tree, folder or None, recursive=recursive, revision=info.sha)

    info = ask(api.repo_info, revision=revision)
    gated = bool(info.gated)
    if gated:
        ask(api.auth_check)  # now, and not after hours of other downloads
    entries: list[Any] = []
    for prefix in sources.prefixes(source):
        # Everything below a folder only where a pattern reaches deeper than it.
        deep = any("/" in p[len(prefix) :].lstrip("/") for p in source.files if p.startswith(prefix))
        with contextlib.suppress(EntryNotFoundError):
            entries += listed(prefix, recursive=deep)
    if exact := sources.exact(source):
        entries += ask(api.get_paths_info, exact, revision=info.sha)
    files = {}
    for entry in entries:
        if isinstance(entry, RepoFile) and sources.matches(source, entry.path):
            files[entry.path] = {"size": entry.size} | (
                {"sha256": entry.lfs.sha256} if entry.lfs else {"git": entry.blob_id}
            )
    if not files:
        there = sorted(e.path + ("" if isinstance(e, RepoFile) else "/") for e in listed(""))
        raise PipelineError(
            f"{source.id}: nothing in it is called {' or '.join(source.files[:4])}; it holds {', '.join(there[:12])}"
            f"{' …' if len(there) > 12 else ''}. The repository has changed: see {page(source)}"
        )
    return {"revision": info.sha, "gated": gated, "files": files}


def _resolve_url(want: Want) -> dict[str, Any]:
    """The newest of a source's addresses that answers, with size and ETag; its ETag is its revision."""
    from huggingface_hub.utils import hf_raise_for_status

    tried = []
    for address in (want.source.id, *want.source.alternatives):
        url = _mirrored(address)
        answer = patiently(lambda u=url: _head(u), want.source.key)
        if answer.status_code == 404:
            tried.append(url)
            continue
        hf_raise_for_status(answer)
        if "Content-Length" not in answer.headers:
            raise PipelineError(f"{url}: the server does not say how large the file is; fetch it by hand")
        entry = {"size": int(answer.headers["Content-Length"]), "url": _without_login(url)}
        entry |= {k: v for k in ("etag", "last-modified") if (v := answer.headers.get(k, ""))}
        revision = (answer.headers.get("etag") or answer.headers.get("last-modified") or entry["url"]).strip('W/"')
        return {"revision": revision, "gated": False, "files": {Path(urlsplit(url).path).name: entry}}
    raise PipelineError(
        f"not found (404): {', '.join(tried)}; look for its new place and put the file in {show(want.target)}, "
        f"then run: {want.again}"
    )


def _session() -> Any:
    """The library's HTTP client, none of whose requests waits for ever: some of its calls set no limit."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:  # a lost connection replaces the client
        hooks.append(_limit)
    return get_session()


def _limit(request: Any) -> None:
    if not (request.extensions.get("timeout") or {}).get("read"):
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), API_TIMEOUT)


def _head(url: str) -> Any:
    from huggingface_hub.utils import hf_raise_for_status

    answer = _session().head(url, headers={"Accept-Encoding": "identity"}, follow_redirects=True, timeout=None)
    if answer.status_code != 404:
        hf_raise_for_status(answer)
    return answer


def _mirrored(url: str) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    return mirror + urlsplit(url).path if mirror else url


def _without_login(url: str) -> str:
    """The address without `user:password@`: pins and stage records are files that are passed on."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _with_login(url: str) -> str:
    """The address as the mirror of today wants it, where it is that mirror's."""
    mirror, parts = urlsplit(os.environ.get(MIRROR_VARIABLE, "")), urlsplit(url)
    own = mirror.netloc.rpartition("@")[2] == parts.netloc
    return parts._replace(netloc=mirror.netloc).geturl() if own and "@" in mirror.netloc else url


def _show_summary(plans: list[Plan]) -> None:
    rows = []
    for plan in plans:
        key = (plan.want.source.key, plan.needed)
        if not plan.missing or key in _shown:
            continue
        _shown.add(key)
        source, here = plan.want.source, plan.size - plan.needed
        terms = "terms accepted" if plan.origin["gated"] else ""
        sizes = [size_text(plan.size), size_text(here) if here else "", size_text(plan.needed)]
        rows.append([source.key, len(plan.files), *sizes, terms, source.licence, plan.origin["revision"][:12]])
    if not rows:
        return
    log.info("%s", cli.table(rows, ["to fetch", "files", "size", "here", "needed", "gated", "licence", "revision"]))
    for disk, (needed, free, _) in _by_disk(plans).items():
        log.info("%s to fetch, %s free at %s", size_text(needed), size_text(free), show(disk))


def _by_disk(plans: list[Plan]) -> dict[Path, tuple[int, int, int]]:
    """(bytes needed, bytes free, device) by one folder a disk."""
    disks: dict[int, tuple[Path, int, int]] = {}
    for plan in plans:
        if not plan.missing:
            continue
        folder = next(p for p in plan.want.target.parents if p.exists())
        device = folder.stat().st_dev
        place, needed, _ = disks.get(device, (folder, 0, 0))
        disks[device] = (place, needed + plan.needed, shutil.disk_usage(folder).free)
    return {place: (needed, free, device) for device, (place, needed, free) in disks.items()}


def _space_problems(plans: list[Plan]) -> list[str]:
    return [
        f"{size_text(needed)} are to be fetched, and {size_text(free)} are free on the disk of {show(folder)}: "
        "free some, use another disk (--data-dir, MEDGEMMA_KOREAN_ROOT), or take less (--max-gb)"
        for folder, (needed, free, _) in _by_disk(plans).items()
        if needed and needed + RESERVE > free
    ]


# during -------------------------------------------------------------------------------------------------


def fetch(plan: Plan, args: argparse.Namespace, paths: RunPaths, program: str) -> dict[str, Any]:
    """Bring a plan's folder about and return its origin for the stage record: nothing to do where it is whole.

    Raises PipelineError in words for whatever a network, a hub or a disk does.
    """
    want = plan.want
    if plan.origin is None:
        return {"origin": "brought by hand", "licence": want.source.licence}
    if plan.rebuild:
        with in_words(want), _locked(want):
            _fetch(plan, args, paths, program)
    elif not want.into:
        settle(plan)
    return plan.origin


def _fetch(plan: Plan, args: argparse.Namespace, paths: RunPaths, program: str) -> None:
    want, begun = plan.want, time.monotonic()
    _drop_stale_parts(plan)
    if want.target.is_dir():
        _adopt(plan)
    files = [plan.file(name) for name in plan.missing]
    if files:
        here = plan.size - sum(f.size for f in files)
        transfer = Transfer(want.source.key, files, want.partial, here, args.connections)
        try:
            digests = transfer.run(
                lambda done, of, text: progress.update(
                    paths, program, state="running", done=done, total=of, metric=f"{want.source.key} {text}"
                )
            )
        except BaseException as error:
            ended = isinstance(error, (cli.Interrupted, KeyboardInterrupt))
            progress.update(paths, program, state="interrupted" if ended else "failed")
            raise
        finally:
            _fetched.append(transfer.fetched)
        for name, digest in digests.items():
            plan.files[name]["sha256"] = digest
        records.write_json(want.pin, plan.origin)
        finished(want.source.key, len(files), transfer.fetched, time.monotonic() - begun)
    if absent := [name for name, entry in plan.files.items() if not _same(want.partial / name, entry)]:
        raise AssertionError(f"{want.source.key}: {absent[:3]} neither fetched nor taken over")
    if not want.into:
        publish(want.partial, want.target)
        settle(plan)


def fetch_ahead(plan: Plan, name: str) -> Path:
    """One small file of a plan before the others, which tells whether they are wanted; returns where it is."""
    want = plan.want
    if name in plan.missing:
        with in_words(want), _locked(want):
            transfer = Transfer(want.source.key, [plan.file(name)], want.partial, 0, 1)
            plan.files[name]["sha256"] = transfer.run(lambda *_: None)[name]
            _fetched.append(transfer.fetched)
        plan.missing.remove(name)
    return next(folder / name for folder in (want.partial, want.target) if (folder / name).is_file())


def altered(record_path: Path, force: bool) -> bool:
    """True when --force is given and what a stage made of fetched files is no longer what it made."""
    return force and record_path.is_file() and bool(check_outputs(record_path))


def settle(plan: Plan) -> None:
    """Note in the pin that its files are in place: until then they are still to be brought about."""
    if plan.origin.pop("pending", None):
        records.write_json(plan.want.pin, plan.origin)


def publish(made: Path, target: Path) -> None:
    """Rename a whole folder to its place; one that is there is kept, hidden from the readers of its parent."""
    if target.exists():
        # One rename: a kill between two would leave a name that the next one stumbles over.
        names = (f".{target.name}.previous" + (f".{n}" if n > 1 else "") for n in itertools.count(1))
        kept = next(path for path in map(target.with_name, names) if not path.exists())
        target.rename(kept)
        log.info("the old files are kept as %s", show(kept))
    (made / ".lock").unlink(missing_ok=True)
    made.rename(target)


def _drop_stale_parts(plan: Plan) -> None:
    """Remove what belongs to no file of the pin: parts of an older revision."""
    folder = plan.want.partial
    expected = {plan.file(name).part(folder) for name in plan.files}
    for part in folder.rglob(".*.part"):
        if part not in expected:
            part.unlink()


def link(old: Path, new: Path) -> None:
    """The same file under a second name; a copy where the disk has no such thing."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _adopt(plan: Plan) -> None:
    """Take over the files that are in place already and are the same, without a copy where the disk can."""
    for name, entry in plan.files.items():
        old, new = plan.want.target / name, plan.want.partial / name
        if not new.exists() and name not in plan.missing and _same(old, entry):
            new.parent.mkdir(parents=True, exist_ok=True)
            link(old, new)


@contextlib.contextmanager
def _locked(want: Want) -> Iterator[None]:
    """One program at a time fetches a source: two would write into one part."""
    want.partial.mkdir(parents=True, exist_ok=True)
    with open(want.partial / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(
                f"{want.source.key} is being fetched by another program; wait for it or end it, then run: {want.again}"
            ) from None
        yield
        (want.partial / ".lock").unlink(missing_ok=True)


def fetched_bytes() -> int:
    """What this process has brought over the network."""
    return sum(_fetched)


def say_fetched() -> None:
    """The last line of a download: how much came, or that nothing had to."""
    total = fetched_bytes()
    log.info("%s", f"fetched {size_text(total)}" if total else "fetched 0 bytes: everything was there already")


# failures -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_words(want: Want) -> Iterator[None]:
    """Turn what the hub, the network and the disk raise into a PipelineError with the next step."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    source, again = want.source, f"then run: {want.again}"
    name, where = source.id, page(source)
    try:
        yield
    except OfflineModeIsEnabled:
        raise Unreachable(
            f"{name}: is not here yet, and HF_HUB_OFFLINE is set, so that the hub cannot be reached; unset it, {again}"
        ) from None
    except GatedRepoError as error:
        login = "" if error.response.status_code == 403 else ", log in with `hf auth login`"
        raise PipelineError(
            f"{name} needs its terms accepted: open {where} with your account, accept them{login}, {again}"
        ) from None
    except RevisionNotFoundError:
        raise PipelineError(
            f"{name}: the pinned revision is no longer published; take the newest with: {want.again} --update"
        ) from None
    except RepositoryNotFoundError:
        raise PipelineError(
            f"{name}: not found; renamed, or not visible without a login (`hf auth login`). Look at {where}, {again}"
        ) from None
    except EntryNotFoundError as error:
        raise PipelineError(
            f"{name}: {getattr(error, 'file', 'a file')} is listed but not found (404); look at {where}; "
            f"if it was renamed: {want.again} --update"
        ) from None
    except Altered as error:
        raise PipelineError(
            f"{name}: {getattr(error, 'file', 'a file')} came with other content than announced, every time ({error}); "
            f"nothing of it is used. A proxy may alter it, or it is being replaced: later, or for the newest revision, "
            f"run: {want.again} --update"
        ) from None
    except Exception as error:
        if (response := getattr(error, "response", None)) is not None:
            kind = Unreachable if response.status_code == 401 and source.place == "hub" else PipelineError
            raise kind(f"{name}: {_answer(response.status_code, want)}") from None
        if isinstance(error, (json.JSONDecodeError, Garbled)):
            raise PipelineError(
                f"{name}: {_server(source)} gives an answer that is none of a hub; is a proxy or a login page between? "
                f"Check the connection and HF_ENDPOINT, {again}"
            ) from None
        if isinstance(error, (ConnectionError, TimeoutError)) or _is_transport(error):
            raise Unreachable(
                f"{name}: {_server(source)} cannot be reached ({reason(error)}); what has come is kept. "
                f"Check the connection, {again}"
            ) from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PipelineError(
                f"no space left on the disk of {show(want.target)}; what has come is kept. Free some, {again}"
            ) from None
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise PipelineError(
                f"no permission for {error.filename}: {error.strerror}; make it writable, or use another folder "
                f"(--data-dir, MEDGEMMA_KOREAN_ROOT), {again}"
            ) from None
        raise


def _is_transport(error: Exception) -> bool:
    # The HTTP client's own errors (connection refused, time-outs) by their module; http_get adds a bare OSError.
    module = type(error).__module__.split(".")[0]
    return module.startswith(("httpx", "httpcore")) or (type(error) is OSError and error.errno is None)


def _server(source: Source) -> str:
    return "the hub" if source.place == "hub" else urlsplit(_without_login(_mirrored(source.id))).netloc


def _answer(status: int, want: Want) -> str:
    server = _server(want.source)
    again = f"then run: {want.again}"
    if status == 401 and want.source.place == "hub":
        return f"the hub refuses your token (401): `hf auth login` with a valid one (HF_TOKEN goes first), {again}"
    if status == 403:
        return f"your token has no access (403): open {page(want.source)}, ask for it or use another token, {again}"
    if status == 429:
        return f"{server} asks for patience (429), again and again; what has come is kept. Wait some minutes, {again}"
    if status >= 500:
        return f"{server} is in trouble (HTTP {status}), again and again; what has come is kept. Later, {again}"
    return f"{server} answered HTTP {status}; look at {page(want.source)}, {again}"

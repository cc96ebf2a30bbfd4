"""Downloads from the Hugging Face hub, with every failure in words.

A download goes into a hidden neighbour and is renamed when it is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from medgemma_korean.cli import PipelineError, log
from medgemma_korean.paths import show
from medgemma_korean.sources import Source


def fetch(source: Source, target: Path, *, repo_type: str, what: str) -> dict[str, Any]:
    """Download a source's files to `target`; returns {"id", "revision", "licence", "files"}.

    Raises PipelineError for a gated or missing repository, no connection, or no file that matches.
    """
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page = f"the page of {source.id} on the hub"
    again = f"then run: {what}"
    part = target.with_name(f".{target.name}.partial")
    try:
        info = HfApi().repo_info(source.id, repo_type=repo_type, revision=source.revision)
        log.info("downloading %s (revision %s, licence %s)", source.id, info.sha[:12], source.licence)
        snapshot_download(
            source.id, repo_type=repo_type, revision=info.sha, allow_patterns=list(source.files), local_dir=part
        )
    except GatedRepoError:
        raise PipelineError(
            f"{source.id} needs its terms accepted: open {page}, accept them, log in with `hf auth login`, {again}"
        ) from None
    except RepositoryNotFoundError:
        raise PipelineError(
            f"{source.id}: not found, or not visible without a login (`hf auth login`); check {page}, {again}"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise PipelineError(
            f"{source.id}: the hub cannot be reached ({type(error).__name__}); "
            f"check the connection or HF_HUB_OFFLINE, {again}"
        ) from None
    except HfHubHTTPError as error:
        raise PipelineError(f"{source.id}: the hub answered {str(error).splitlines()[0]}; {again}") from None
    except Exception as error:
        # The HTTP client's own errors (connection refused, time-outs) carry the module's name.
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise PipelineError(
                f"{source.id}: the hub cannot be reached ({type(error).__name__}); check the connection, {again}"
            ) from None
        raise
    shutil.rmtree(part / ".cache", ignore_errors=True)
    files = [p for p in part.rglob("*") if p.is_file()]
    if not files:
        raise PipelineError(f"{source.id}: no file matches {', '.join(source.files)}; the repository has changed")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.rename(target)
    log.info("%s: %d files, %.2f GB", show(target), len(files), sum(p.stat().st_size for p in target.rglob("*")) / 1e9)
    return {"id": source.id, "revision": info.sha, "licence": source.licence, "files": len(files)}

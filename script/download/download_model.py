"""Get the base model: fetched from the hub (a licence to accept), or built on the spot for a model that is built.

Reads   hub: google/medgemma-4b-it or google/medgemma-27b-text-it
Writes  model/raw/<model>/

    python script/download/download_model.py --model medgemma-4b
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from medgemma_korean import cli
from medgemma_korean.cli import PipelineError
from medgemma_korean.sources import BY_KEY
from medgemma_korean.stage import Stage

FORMAT = 1


def main(argv: list[str] | None = None) -> int:
    parser = cli.make_parser(__doc__)
    args = parser.parse_args(argv)
    profile, paths = cli.resolve(args)
    if profile.source == "build":
        # Its own process: a program never imports another one.
        builder = Path(__file__).parents[1] / "model" / "build_tiny_model.py"
        return subprocess.call([sys.executable, str(builder), *(argv if argv is not None else sys.argv[1:])])
    cli.start_logging(paths, "download_model")
    source = BY_KEY[profile.name]
    stage = Stage(
        "download_model",
        paths,
        outputs=[paths.raw_model],
        inputs=[],
        settings={"id": source.id, "revision": source.revision},
        format=FORMAT,
        force=args.force,
        driver_stage="download",
        record_inside=True,
    )
    if (code := stage.already_complete()) is not None:
        return code

    from medgemma_korean import hub

    again = paths.command("download/download_model")
    with stage.work(resumable=True) as folder:
        origin = hub.fetch(source, folder / "files", repo_type="model", what=again)
        for file in (folder / "files").iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(folder / "files")
        if not any(folder.glob("*.safetensors")):
            raise PipelineError(f"{source.id}: no safetensors weights in the repository")
        stage.complete(counts={"files": origin["files"]}, origins={source.key: origin})
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

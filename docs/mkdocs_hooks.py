"""Hooks of `mkdocs build`: the site has the repository's layout, so that links work in both."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import orpo_ray

ROOT = Path(__file__).resolve().parent.parent
BESIDE_DOCS = (
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "benchmarks/RESULTS.md",
    "benchmarks/demo_curves.png",
    "benchmarks/gpu/README.md",
    "benchmarks/real_model/curves.png",
    "benchmarks/real_model/objectives.png",
    "cluster/README.md",
    "docs/site.css",
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside `docs/`, and put those inside it under `docs/`."""
    pages = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md"))]
    ours = [
        File.generated(config, name, abs_src_path=str(ROOT / name))
        for name in (*BESIDE_DOCS, *pages)
    ]
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*ours, *of_theme])


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append the reference, from docstrings, to the page of the Python API."""
    if page.file.src_uri != "docs/python.md":
        return markdown
    names = [name for name in orpo_ray.__all__ if not name.startswith("__")]
    return "\n\n".join([markdown, "## Reference", *(f"::: orpo_ray.{name}" for name in names)])

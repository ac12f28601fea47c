"""What mkdocs asks while it builds the site: the pages that docs/ lacks, and their place in it."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))

import api_pages
import tutorial_pages

REFERENCE = "Reference"


def on_config(config: Any) -> Any:
    """Put the reference where the navigation of mkdocs.yml leaves a place for it."""
    config.nav = [
        {REFERENCE: api_pages.navigation()} if REFERENCE in entry else entry for entry in config.nav
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference and of the tutorials to those of docs/."""
    for path, text in {**api_pages.pages(), **tutorial_pages.pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to notebooks lead to their pages; a notebook's page still links to the file."""
    return markdown if page.file.generated_by else tutorial_pages.to_site(markdown)

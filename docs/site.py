"""A hook of MkDocs: the site has the repository's layout, so that links work here and on GitHub."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from prl_lightning import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prl_lightning"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"(?<=\]\()(?!https?:)([^)#\s]+)")  # without its anchor
HTML_LINK = re.compile(r'(?<=href=")((?!https?:)[^"#]+)\.(?:md|ipynb)(?=["#])')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the package's version at the foot of each page.

    Args:
        config: of the site.
    """
    config.copyright = f"prl_lightning {__version__}"
    return config


@event_priority(100)  # before mkdocs-jupyter, which turns the notebooks among the files into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the pages, the files that they link, and one API page for each folder of the package.

    Args:
        files: of ``docs_dir``, which are replaced, and of the theme.
        config: of the site; its navigation gets the API pages.
    """
    pages = [*PAGES, *sorted((ROOT / "docs").glob("*.md"))]
    linked = {
        (page.parent / target).resolve()
        for page in pages
        for target in LINK.findall(page.read_text())
    }
    shown = [path for path in sorted(linked) if path.is_file() and PACKAGE not in path.parents]
    site = [
        File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls)
        for path in dict.fromkeys([*pages, *shown])
    ]
    api = {
        f"{folder.relative_to(ROOT)}.md": api_page(folder)
        for folder in [PACKAGE, *sorted(PACKAGE.rglob("*/"))]
        if (folder / "__init__.py").exists()
    }
    config.nav = [*(config.nav or []), {"API": list(api)}]
    site += [File.generated(config, uri, content=text) for uri, text in api.items()]
    return Files([*site, *(file for file in files if file.src_dir != config.docs_dir)])


def api_page(folder: Path) -> str:
    """Return a page with every public name of a folder's modules.

    Args:
        folder: of the package.
    """
    name = ".".join(folder.relative_to(ROOT).parts)
    modules = [f"{name}.{file.stem}" for file in sorted(folder.glob("[!_]*.py"))]
    package = f"::: {name}"
    if "__all__" in (folder / "__init__.py").read_text():  # of its modules, which follow
        package += "\n    options: {members: false}"
    return "\n\n".join([f"# {name}", package, *(f"::: {module}" for module in modules)])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to the package's source to the API page that has it.

    Args:
        markdown: of the page.
        page: the page.
        config: of the site.
        files: of the site.
    """

    def to_api(match: re.Match[str]) -> str:
        up, _, path = match[1].partition("prl_lightning/")
        if not match[1].startswith(("prl_lightning/", "../prl_lightning/")):
            return match[1]
        folder, _, file = path.rpartition("/")
        if not file.endswith(".py"):
            return f"{up}prl_lightning/{path.rstrip('/')}.md"
        module = f"prl_lightning/{path.removesuffix('.py')}".replace("/", ".")
        return f"{up}prl_lightning{'/' * bool(folder)}{folder}.md#{module}"

    return LINK.sub(to_api, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead a notebook's links to pages, which mkdocs-jupyter leaves as they are.

    Args:
        html: of the page.
        page: the page.
        config: of the site.
        files: of the site.
    """
    return HTML_LINK.sub(r"\1.html", html) if page.file.src_uri.endswith(".ipynb") else html

"""Links between the Markdown files, and docstrings against what the site needs of them.

`make docs` checks the site itself: links between its pages, cross-references, names that are not
there. Links to other sites are not checked, since tests need no network.
"""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import samkernels
from samkernels import backends, ops
from samkernels.integrations import accelerate, cli, lightning, transformers

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs"


# -- links -----------------------------------------------------------------------------------------


def committed(pattern: str) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git clone")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).exists()]


def prose_of(page: Path) -> str:
    """Without code, in which brackets and # mean something else."""
    text = re.sub(r"^( *)(```+).*?^\1\2 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)[^`].*?\1", "", text)


def anchors_of(page: Path) -> set[str]:
    """Of the headings, where GitHub and the site agree."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        of_github = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        if "--" not in of_github:  # the site has one hyphen there
            anchors.add(of_github)
    return anchors


def broken_links(page: Path) -> Iterator[str]:
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)", prose_of(page))
    references = re.findall(r"^ *\[[^\]]+\]: +(\S+)", prose_of(page), flags=re.MULTILINE)
    for link in [*inline, *references]:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            yield f"{page}: there is no {link}"
        elif PAGES in page.parents and PAGES not in target.parents:
            yield f"{page}: {link} is no page of the site; name the path instead"
        elif anchor and (target.suffix != ".md" or anchor not in anchors_of(target)):
            yield f"{page}: no heading for {link}"


def test_links_between_files_lead_somewhere() -> None:
    pages = committed("*.md")
    assert {ROOT / "README.md", PAGES / "recipes.md"} <= {*pages}
    assert [problem for page in pages for problem in broken_links(page)] == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](gone.md)",
        "![a](gone.png)",
        "[a](other.md#gone)",
        "[a](#gone)",
        "[a](image.png#first)",
        "see [a]\n\n[a]: gone.md",
        "`[a](fine.md)` but [a](gone.md)",
        "```\n# In code\n```\n[a](#in-code)",
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.md").write_text("# First, and `last`\n")
    (tmp_path / "image.png").touch()
    page = tmp_path / "page.md"
    good = "[a](other.md) [a](other.md#first-and-last) [a](https://example.org/gone) [a](image.png)"
    page.write_text(f"{good}\n```\n[a](gone.md)\n```\n")
    assert list(broken_links(page)) == []
    page.write_text(f"{good}\n\n{text}\n")
    assert len(list(broken_links(page))) == 1


def test_pages_have_their_place_in_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from files(child)

    assert sorted(files(nav)) == sorted(str(p.relative_to(PAGES)) for p in PAGES.rglob("*.md"))


# -- docstrings ------------------------------------------------------------------------------------

MODULES = {
    module.__name__: module
    for module in (samkernels, ops, backends, accelerate, cli, lightning, transformers)
}
# Needs its framework when it is imported; `make docs` reads it without.
UNREAD = "samkernels.integrations.fastai."


def documented() -> list[str]:
    names = re.findall(r"^::: (\S+)$", (PAGES / "api.md").read_text(), flags=re.MULTILINE)
    return [name for name in names if name not in MODULES and not name.startswith(UNREAD)]


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(MODULES[module], attribute)


def test_all_public_names_are_on_the_page() -> None:
    public = [
        f"{name}.{attribute}"
        for name in ("samkernels", "samkernels.ops")
        for attribute in MODULES[name].__all__
        if callable(getattr(MODULES[name], attribute))
    ]
    assert {*public} <= {*documented()}


def functions() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every documented function and method, and the docstring that has its arguments."""
    for name in documented():
        thing = resolve(name)
        if not inspect.isclass(thing):
            yield name, thing, thing.__doc__
            continue
        yield name, thing.__init__, thing.__doc__
        for method, function in vars(thing).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                # A rule's methods are documented where a variant declares them.
                yield f"{name}.{method}", function, inspect.getdoc(getattr(thing, method)) or ""


def arguments_in(docstring: str) -> list[str]:
    """What stands before the colons of the section Args."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.M)
    entries = re.findall(r"^ {4}(\S.*?):(?: |$)", section[1], re.M) if section else []
    return [name for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize(("name", "function", "docstring"), list(functions()))
def test_docstring_fits(name: str, function: Callable[..., Any], docstring: str) -> None:
    assert docstring, f"{name} has no docstring"
    assert {*arguments_in(docstring)} <= {*inspect.signature(function).parameters}
    # An example without an empty line before it would be set as prose.
    assert "Usage:\n " not in docstring


def test_arguments_are_read() -> None:
    assert arguments_in(ops.perturb_.__doc__ or "")[:4] == [
        "params",
        "direction",
        "old_params",
        "rho",
    ]

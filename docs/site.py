"""What mkdocs calls while it builds the site: makes the pages that are written elsewhere already, and completes the navigation.

A method's page comes from its file, the API from the package's names, the rest from the README and the files beside it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import offbeat as ob
from offbeat.cli.flags import described
from offbeat.cli.simulate import kind

sys.path.insert(0, str(Path(__file__).parent))
from timeline import timeline

ROOT = Path(__file__).parent.parent
BESIDE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Pages that are files of the repository's first folder."""
KINDS = {
    "server": "A server holds the model. Workers send it gradients, or steps of their own, and never wait for each other.",
    "gossip": "There is no server. Workers exchange models with a few others.",
    "periodic": "Workers train on their own and average their models from time to time.",
    "correction": "What a server method may do about a gradient that comes late.",
}
API = {
    "training": ("Training", "Real runs, in your own loop.", ("runtime",)),
    "simulation": ("Simulation", "Simulated clusters and the runs on them.", ("engines", "experiment")),
    "records": ("Records and failures", "What a run leaves, and how one ends.", ("trace", "failure")),
    "tasks": ("Tasks", "What is trained in a simulation or by name.", ("tasks",)),
    "methods": ("Kinds of method", "The base classes that methods derive from.", ("core.method", "core.master", "core.gossip", "core.periodic", "core.problem")),
    "values": ("Rules, schedules, topologies", "What methods are made of.", ("core.descent", "core.schedule", "core.topology")),
}  # fmt: skip
"""Pages of the API: title, what is there, and the modules of the public names on it."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    for name, source in BESIDE.items():
        files.append(File.generated(config, name, content=moved((ROOT / source).read_text("utf-8"))))
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.name}.md", content=example(path)))
    for name, content in (*method_pages(), *api_pages()):
        files.append(File.generated(config, name, content=content))
    config.nav = navigation(config.nav, {file.src_uri for file in files.documentation_pages()})
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page to the repository's examples go to the pages that show them."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+(examples/\w+\.py)\)", rf"]({up}\1.md)", markdown)


def moved(text: str) -> str:
    """A file of the first folder as a page of the site: its links lead from there."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((examples/\w+\.py)\)", r"](\1.md)", text)
    return re.sub(r"\]\(([A-Z]+)\.md\)", lambda found: f"]({found[1].lower()}.md)", text)


def example(path: Path) -> str:
    return f"# {path.name}\n\n```python\n{path.read_text('utf-8').rstrip()}\n```\n"


# methods


def classes() -> Iterator[type[Any]]:
    for name in ob.methods.__all__:
        if isinstance(cls := getattr(ob.methods, name), type):
            yield cls


def kind_of(cls: type[Any]) -> str:
    return kind(cls) if issubclass(cls, ob.Method) else "correction"


def method_pages() -> Iterator[tuple[str, str]]:
    """The list of all methods, and a page for each."""
    groups = defaultdict(list)
    for cls in classes():
        groups[kind_of(cls)].append(cls)
        yield f"methods/{cls.__name__}.md", method_page(cls)
    text = ["# Methods", "", "[Choose a method](../choose.md) says which one suits which cluster.", ""]
    for name, about in KINDS.items():
        title = {"correction": "Corrections", "periodic": "Averages"}.get(name, name.capitalize())
        text += [f"## {title}", "", about, "", "| method | |", "|---|---|"]
        text += [f"| [{cls.__name__}]({cls.__name__}.md) | {summary(cls)} |" for cls in groups.pop(name)]
        text.append("")
    assert not groups, f"say in KINDS what these are: {', '.join(groups)}"
    yield "methods/index.md", "\n".join(text)


def summary(cls: type[Any]) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).replace("|", "\\|").replace("_", "\\_")


def method_page(cls: type[Any]) -> str:
    """The docstring, the loop, a picture, the parameters and the source of a method."""
    module = sys.modules[cls.__module__]
    source = Path(inspect.getfile(cls)).read_text("utf-8")
    head, _, loop = (inspect.getdoc(module) or "").partition("\n\n")
    first, _, rest = (inspect.getdoc(cls) or "").partition("\n\n")
    what = f"`{cls.name}`, a {kind_of(cls)} method" if issubclass(cls, ob.Method) else "A correction"
    rest = re.sub(r"\n(?=(?:Differences from|Weight decay))", "\n\n", rest)
    text = [f"# {cls.__name__}", "", f"*{what}.* {prose(first)}", "", prose(rest), "", "## Loop", "", prose(head)]
    text += ["", f"```text\n{loop.rstrip()}\n```" if loop else "The source below is the loop.", ""]
    if issubclass(cls, ob.Method) and (picture := timeline(cls)):
        text += ["## Timeline", "", picture, ""]
    if rows := described(cls):
        text += ["## Parameters", "", "| name | default | |", "|---|---|---|"]
        text += [
            "| " + " | ".join(f"`{c}`" if i < 2 else prose(c) for i, c in enumerate(row)).replace("||", "\\|\\|") + " |"
            for row in rows
        ]
    text += [
        "",
        "## Source",
        "",
        f"`offbeat/methods/{Path(inspect.getfile(cls)).name}`",
        "",
        f"```python\n{source.rstrip()}\n```",
        "",
    ]
    return "\n".join(text)


def prose(text: str) -> str:
    """Text of a docstring as Markdown: formulas in it have stars, brackets and underscores that mean themselves."""
    return re.sub(r"([*_<>\[\]|])", r"\\\1", text)


# the API


def api_pages() -> Iterator[tuple[str, str]]:
    """A page for each group of public names; a name that belongs to none is an error."""
    left = {name: getattr(ob, name) for name in ob.__all__ if name not in ("methods", "tasks", "presets")}
    for page, (title, about, modules) in API.items():
        here = tuple(f"offbeat.{module}" for module in modules)
        names = [name for name, value in left.items() if value.__module__.startswith(here)]
        text = [f"# {title}", "", about, ""]
        text += [f"::: {left[name].__module__}.{left.pop(name).__name__}\n" for name in names]
        text += ["::: offbeat.engines.presets\n"] if page == "simulation" else []
        yield f"api/{page}.md", "\n".join(text)
    trainers = ("huggingface.distribute", "lightning.OffbeatStrategy")
    text = [f"::: offbeat.integrations.{name}\n" for name in trainers]
    yield "api/integrations.md", "\n".join(["# Trainers", "", "Training loops of other libraries.", "", *text])
    assert not left, f"say in API where these are: {', '.join(left)}"
    lines = [f"| [{title}]({page}.md) | {about} |" for page, (title, about, _) in API.items()]
    lines.append("| [Trainers](integrations.md) | `offbeat.integrations`: Hugging Face and Lightning. |")
    lines.append("| [Methods](../methods/index.md) | `offbeat.methods`: every method and correction. |")
    yield (
        "api/index.md",
        "# API\n\nAll names are those of `import offbeat as ob`. Other modules may change without notice.\n\n| page | |\n|---|---|\n"
        + "\n".join(lines)
        + "\n",
    )


# navigation


def navigation(nav: list[Any], pages: set[str]) -> list[Any]:
    """``nav`` with every page: those that it does not name go to the section of their folder."""
    named = set(_named(nav))
    folders = {
        "methods": "Methods",
        "recipes": "Recipes",
        "api": "API",
        "guide": "Learn",
        "examples": "Examples",
        "": "Learn",
    }
    sections = {title: content for entry in nav for title, content in entry.items() if isinstance(content, list)}
    sections["Examples"] = []
    for page in sorted(pages - named, key=str.lower):
        sections[folders[page.rpartition("/")[0]]].append(page)
    sections["Recipes"].append({"Examples": sections["Examples"]})
    return nav


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _named(part)

"""The documents are true: their Python runs, their commands are understood, what they quote is said, and links lead somewhere.

Blocks of a page share a namespace and a folder. Two kinds of HTML comment before a block are for this file: ``<!-- hidden`` with lines of
Python that a fragment needs, and ``<!-- not run: why -->``. A block with a title is written to a file of that name and then run.
markdown-it, which comes with rich, finds the blocks: packages that run Markdown know no titles, and no commands.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt

import offbeat as ob
from offbeat.cli import COMMANDS
from offbeat.cli.flags import parse
from offbeat.log import LAUNCH, SERVER, TREE, WORKER

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md"))])
FREE = {"design.md", "performance.md", "results.md", "CONTRIBUTING.md"}
"""Pages whose blocks are diagrams, tables and pieces of files."""
OTHERS = {
    *[
        "python",
        "python3",
        "pip",
        "export",
        "srun",
        "torchrun",
        "make",
        ".",
        "wait",
        "kill",
        "grep",
        "[",
        "sleep",
        "ssh",
        "curl",
    ]
}
"""Commands of others, which are taken as they are."""
KEYWORDS = {"if", "then", "until", "while", "do", "done"}


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """What a page configures is over with it."""
    loggers = (TREE, SERVER, WORKER, LAUNCH)
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


class Block(NamedTuple):
    """A piece of code on a page."""

    language: str
    title: str
    code: str
    line: int


def blocks(path: Path) -> Iterator[Block]:
    """The code of a page, hidden pieces too; not what is not run."""
    skip = False
    for token in MarkdownIt().parse(path.read_text("utf-8")):
        line = (token.map or [0])[0] + 1
        if token.type == "html_block":
            if found := re.match(r"<!-- hidden\n(.*?)-->", token.content, re.S):
                yield Block("python", "", found[1], line)
            skip = skip or token.content.startswith("<!-- not run: ")
        elif token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            if not skip:
                yield Block(language, title[1] if title else "", token.content, line)
            skip = False
        elif token.type == "code_block" and path.name not in FREE:
            raise AssertionError(f"{path}:{line}: an indented block, which nothing runs: fence it and say its language")


def names(pages: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in pages]


@pytest.mark.filterwarnings("ignore:.*treespec", "ignore:The .* does not have many workers")  # Lightning's
@pytest.mark.parametrize("page", names(PAGES))
def test_python_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path(page).name in FREE:
        pytest.skip("its blocks are no programs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", [page])
    before = {*sys.modules}
    shared: dict[str, Any] = {"__name__": "__main__"}
    made: list[ob.Replica] = []
    make = ob.Replica.__init__

    def note(self: ob.Replica, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ob.Replica, "__init__", note)
    try:
        for block in blocks(ROOT / page):
            if block.language == "python" and not reads_a_run(block.code):
                if block.title:
                    Path(block.title).write_text(block.code, encoding="utf-8")
                exec(compile("\n" * block.line + block.code, page, "exec"), shared)
    finally:
        for replica in made:
            replica.leave()
        for name in {*sys.modules} - before:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
                del sys.modules[name]


def reads_a_run(code: str) -> bool:
    """Whether a block needs the folder of a run that a command of the page would have made."""
    return '"runs/' in code


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, as words."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"\$\([^)]*\)", "VALUE", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for end, words in groupby(lexer, lambda word: bool(re.fullmatch(r"[;&|()]+", word))):
            command = list(dropwhile(lambda word: word in KEYWORDS or re.fullmatch(r"\w+=.*", word), words))
            if command and not end:
                yield command


@pytest.mark.parametrize("page", names(PAGES))
def test_commands_on_a_page_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of offbeat by its own parser, which refuses a flag that is not there; nothing is started."""
    if Path(page).name in FREE:
        pytest.skip("its blocks are no commands")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = (ROOT / page).read_text("utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for block in blocks(ROOT / page):
        if block.language != "bash":
            assert block.language in ("python", "text", "toml", "yaml", "diff", "sbatch"), (
                f"{page}:{block.line}: {block.language!r}"
            )
            continue
        for words in commands(block.code):
            where = f"{page}:{block.line}: {shlex.join(words)}"
            name = words[0].rpartition("/")[2]
            if name == "offbeat":
                if words[1] in ("--version", "--help"):
                    continue
                assert words[1] in COMMANDS, where
                parse(COMMANDS[words[1]].load(), words[1], [w for w in words[2:] if w != "..."])
            else:
                assert name in OTHERS, f"{where}: no command that is known; add it to OTHERS"
                assert name != "make" or words[1] in targets, where
            for script in (w for w in words if w.endswith(".py") and w != "train.py"):
                assert (ROOT / script).is_file() or f'title="{script}"' in text, f"{where}: no {script}"


def rows(page: str) -> Iterator[tuple[str, str]]:
    """What a table of messages quotes, and its line."""
    for line in (DOCS / page).read_text("utf-8").splitlines():
        if found := re.match(r"\| `([^`]+)` \|", line):
            yield found[1], line


def test_messages_in_troubleshooting_are_said() -> None:
    """Each piece of a quoted message between dots is in the source as it stands."""
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")))
    found = list(rows("troubleshooting.md"))
    assert len(found) > 20
    for message, line in found:
        for piece in message.split("..."):
            assert piece.strip() in source, f"nothing says {piece.strip()!r}: {line}"


def test_links_between_pages_lead_somewhere() -> None:
    made = {"methods/index.md", "api/index.md", "changelog.md", "contributing.md", "security.md", "index.md"}
    made |= {f"methods/{name}.md" for name in ob.methods.__all__}
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[\w-]+)?\)", path.read_text("utf-8")):
            there = (path.parent / target).resolve()
            inside = there.relative_to(DOCS) if there.is_relative_to(DOCS) else None
            assert there.exists() or str(inside) in made, (
                f"{path.relative_to(ROOT)} leads to {target}, which is not there"
            )


def test_the_check_finds_what_it_is_for(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        '<!-- hidden\nx = 1\n-->\n\n```python title="a.py"\ny = x\n```\n\n<!-- not run: no -->\n```bash\nnonsense\n```\n\n```bash\nA=1 offbeat methods && make test # c\n```\n'
    )
    assert list(blocks(path)) == [
        Block("python", "", "x = 1\n", 1),
        Block("python", "a.py", "y = x\n", 5),
        Block("bash", "", "A=1 offbeat methods && make test # c\n", 14),
    ]
    assert list(commands("A=1 offbeat methods && make test # c\n")) == [["offbeat", "methods"], ["make", "test"]]
    path.write_text("text\n\n    indented\n")
    with pytest.raises(AssertionError, match="an indented block"):
        list(blocks(path))

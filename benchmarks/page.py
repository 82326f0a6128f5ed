"""Put the newest figures into a page: ``python -m benchmarks.page [PAGE]``, by default docs/performance.md.

What lies between the lines ``<!-- NAME -->`` and ``<!-- / -->`` is made of ``runs/bench/NAME.json`` and ``NAME.png``; the
picture is copied into the folder ``images`` beside the page. The rest is written by hand, and stays.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

from PIL import Image

from .record import OUT, Record

BLOCK = re.compile(r"<!-- (\w+) -->\n.*?<!-- / -->", re.DOTALL)


def block(record: Record) -> str:
    """Picture, table, and what it was measured with."""
    titles, *lines = record.table()
    numbers = ("min", "median", "max", "aim")
    rows = [titles, tuple("---:" if title in numbers else "---" for title in titles), *lines]
    table = "\n".join(f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in rows)
    machine = ", ".join(
        value if name in ("processor", "system") else f"{name}: {value}" for name, value in record.machine.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    picture = f"![{record.question}](images/bench-{record.name}.png)\n\n" if measured(record) else ""
    return f"{picture}{table}\n\n`{record.command}`, {record.seconds:.0f} s on {record.date}; {machine}; {versions}.\n"


def measured(record: Record) -> bool:
    """Whether there is any figure in it to draw."""
    return not all(math.isnan(row.median) for row in record.rows)


def refresh(text: str, records: dict[str, Record]) -> str:
    """``text`` with the blocks of ``records`` made anew; raises ``ValueError`` where one has no place."""
    places = BLOCK.findall(text)
    for name in records:
        if name not in places:
            raise ValueError(f"the page has no place for {name}: add the lines <!-- {name} --> and <!-- / -->")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n\n{block(records[name])}\n<!-- / -->" if name in records else match[0]

    return BLOCK.sub(made, text)


def main(page: Path) -> None:
    records = {path.stem: Record.read(path) for path in sorted(OUT.glob("*.json"))}
    page.write_text(refresh(page.read_text(encoding="utf-8"), records), encoding="utf-8")
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    for name in filter(lambda name: measured(records[name]), records):
        few = Image.open(OUT / f"{name}.png").quantize(48)  # a fifth of the bytes, and nobody sees it
        few.save(images / f"bench-{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/performance.md"))

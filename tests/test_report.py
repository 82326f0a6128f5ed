"""Pages: complete in one file, the same when drawn again, and drawn at all for whatever a run may leave."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import offbeat as ob
from offbeat.experiment import Comparison, Grid, compare
from offbeat.report import DASHES, LIGHT, Single, load, page
from offbeat.tasks import Digits, Quadratic

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    methods = ("asgd", "gem(kappa=2.0)", "d-psgd", "asgd(lr=1e40)")
    return compare(Grid(methods, Digits(hidden=4), workers=(1, 4), seeds=(0, 1), gradients=60), jobs=1)


def single(method: ob.Method, gradients: int = 60, **failed: str) -> Single:
    events = (ob.Crash(1, 3.0), ob.Join(1, 5.0))
    run = ob.simulate(method, Digits(hidden=4), ob.Cluster(3, events=events), gradients=gradients, evaluate_every=20)
    return Single(
        run.trace, {"figures": run.summary(), "failure": "", "message": "", "command": "offbeat <x>", **failed}
    )


def pictures(text: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]


class Outside(HTMLParser):
    """Everything that a browser would fetch, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "action", "data", "poster")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def complete(path: Path) -> str:
    """The text of a page that fetches nothing."""
    text = path.read_text()
    seen = Outside(text)
    assert seen.open == []
    assert all(address.startswith("data:image/png;base64,") for address in seen.addresses)
    assert "://" not in re.sub(r"base64,[^\"]+", "", text)
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    return text


def test_the_page_of_a_comparison_holds_everything_and_can_be_drawn_again(
    comparison: Comparison, tmp_path: Path
) -> None:
    text = complete(page(comparison, tmp_path))
    comparison.write(tmp_path)
    assert page(load(tmp_path), tmp_path).read_text() == text
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert files.keys() == {"accuracy-over-workers.png", "accuracy-over-time.png", "loss.png", "staleness.png"}
    inside = pictures(text)
    assert all(picture.startswith(PNG) for picture in inside)
    assert len(inside) == 2 * len(files)  # one for dark surroundings each
    assert set(files.values()) < set(inside)
    plain = html.unescape(re.sub(r"<[^>]+>", "\n", text))
    for line in comparison.table():
        for cell in line:
            assert cell in plain
    header = comparison.header
    for fact in (header["task"], header["speed"], *header["methods"].values(), f"torch {header['versions']['torch']}"):
        assert fact in plain
    failed = next(cell for cell in comparison.cells if cell.failure)
    assert failed.message in plain


def test_what_was_run_and_on_what_is_said(tmp_path: Path) -> None:
    run = single(ob.methods.ASGD())
    run.trace.header["provenance"] = {"digits": "official", "extra": "differs: sha256 <1>"}
    text = complete(page(run, tmp_path))
    assert "offbeat &lt;x&gt;" in text
    assert "Not the official data: extra differs: sha256 &lt;1&gt;." in text
    assert "digits official" not in text
    assert len(pictures(text)) == 4  # this method has no figures of its own


def test_the_page_of_a_run_has_the_method_s_own_figures(tmp_path: Path) -> None:
    run = single(ob.methods.GEM())
    text = complete(page(run, tmp_path))
    assert {path.stem for path in tmp_path.glob("*.png")} == {"loss", "staleness", "method"}
    assert "1 crashed, 1 joined" in text
    for name in run.summary["figures"]:
        assert name in text


def test_a_run_that_blew_up_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ob.Diverged) as error:
        ob.simulate(ob.methods.ASGD(lr=5.0), Quadratic(), ob.Cluster(2), gradients=2000, evaluate_every=5)
    run = Single(error.value.trace, {"figures": {}, "failure": "Diverged", "message": "it <blew> up", "command": ""})
    assert "it &lt;blew&gt; up" in complete(page(run, tmp_path))


def test_a_run_without_a_single_event_has_a_page(tmp_path: Path) -> None:
    run = single(ob.methods.ASGD(), message="interrupted")
    empty = Single(ob.Trace(run.trace.header), {**run.summary, "figures": {}})
    assert pictures(complete(page(empty, tmp_path))) == []


@pytest.mark.parametrize("figures", [{}, {"score": -1.0}, {"accuracy": 1.0, "loss": math.inf}])
def test_any_figures_can_be_drawn(tmp_path: Path, figures: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may have no accuracy, no loss, nothing at all, and a figure may be at the end of its scale."""
    monkeypatch.setattr(Quadratic, "evaluate", lambda self, x: dict(figures))
    complete(page(compare(Grid(("gem",), Quadratic(), workers=(2,), seeds=(0, 1), gradients=20), jobs=1), tmp_path))


def test_a_comparison_that_was_interrupted_is_drawn(comparison: Comparison, tmp_path: Path) -> None:
    text = complete(page(Comparison(comparison.header, comparison.cells[:1]), tmp_path))
    assert "15 cells are missing" in text


def test_many_methods_look_different(comparison: Comparison) -> None:
    assert len(set(LIGHT.colours)) * len(DASHES) >= 20


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps({"figures": {}, "failure": ""})])
def test_a_damaged_summary_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=r"summary\.json is not what `offbeat simulate` has written"):
        load(tmp_path)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} has neither comparison\.json nor summary\.json: give a folder"):
        load(tmp_path)

"""Pages: complete in one file, the same when drawn again, and drawn at all for whatever a run may leave."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import offbeat as ob
from offbeat import report
from offbeat.experiment import NEEDED, Comparison, Grid, compare
from offbeat.figures import entries
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
    for name, value in entries(run.summary["figures"], run.trace):
        assert f"<td>{name}</td><td>{value}</td>" in text


def rows(text: str) -> dict[str, str]:
    """Facts and figures of a page."""
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text) + re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", text)
    return {name: html.unescape(value) for name, value in found}


def test_only_what_was_measured_or_has_happened_is_said(tmp_path: Path) -> None:
    """No row is empty, and none says 0 of what such a run cannot have."""
    server, peers = single(ob.methods.ASGD()), single(ob.methods.DPSGD())
    said = rows(complete(page(server, tmp_path)))
    assert {
        "method",
        "task",
        "cluster",
        "gradients",
        "seed",
        "incidents",
        "crashes",
        "train loss",
        "mean lag",
    } <= said.keys()
    assert not {"mean consensus", "lost messages", "problem"} & said.keys()
    assert "mean consensus" in rows(complete(page(peers, tmp_path)))
    assert all(said.values())
    assert not any("_" in name for name in said)


def test_a_run_of_a_script_is_named_by_what_is_known(tmp_path: Path) -> None:
    """Its trace has no task, no cluster, no number of gradients, and no loss where the script tells none."""
    trace = ob.Trace({"engine": "runtime", "method": "DanaZero(lr=0.05)", "problem": "", "gradients": None})
    for k in range(40):
        trace.add(ob.Event(k / 10, k % 3, k // 3, 2, math.nan, math.nan, math.nan, 0.1))
    figures = {"train_loss": math.nan, "mean_lag": 2.0, "mean_gap": math.nan, "mean_consensus": 0.0, "crashes": 0.0}
    text = complete(page(Single(trace, {"figures": figures, "failure": "", "message": "", "command": ""}), tmp_path))
    assert "<h1>DanaZero on 3 workers</h1>" in text
    assert [path.stem for path in tmp_path.glob("*.png")] == ["staleness"]
    said = rows(text)
    assert said == {
        "method": "DanaZero(lr=0.05)",
        "workers": "3",
        "gradients": "40 by all workers together",
        "mean lag": "2",
    }
    trace.header["messages"] = "gossip"  # whose peers count no lag
    text = complete(page(Single(trace, {**RESULT, "figures": figures}), tmp_path))
    assert "mean lag" not in rows(text)
    assert "Gradients that each worker took." in text
    del trace.header["method"], trace.header["problem"]
    assert "<h1>A run on 3 workers</h1>" in complete(page(Single(trace, {**RESULT, "figures": figures}), tmp_path))


RESULT = {"figures": {}, "failure": "", "message": "", "command": ""}


def test_a_simulation_of_time_alone_has_no_loss(tmp_path: Path) -> None:
    run = ob.simulate(ob.methods.ASGD(), ob.tasks.TimeOnly(1000), ob.Cluster(3), gradients=30)
    text = complete(page(Single(run.trace, {**RESULT, "figures": run.summary()}), tmp_path))
    assert [path.stem for path in tmp_path.glob("*.png")] == ["staleness"]
    said = rows(text)
    assert not {"train loss", "mean gap", "mean consensus"} & said.keys()
    assert {"mean lag", "gradients per second"} <= said.keys()
    grid = Grid(("asgd", "all-reduce"), ob.tasks.TimeOnly(1000), workers=(1, 2), seeds=(0,), gradients=30)
    comparison = compare(grid, jobs=1)
    assert comparison.table()[0] == ["method", "workers", "lag", "seconds", "speed-up"]
    folder = tmp_path / "compared"
    assert "Gradients per second over the number of workers" in complete(page(comparison, folder))
    assert {path.stem for path in folder.glob("*.png")} == {"speed-over-workers", "staleness"}


def test_losses_that_are_told_now_and_then_are_drawn(tmp_path: Path) -> None:
    trace = ob.Trace({"engine": "runtime", "method": "ASGD()"})
    for k in range(40):
        trace.add(ob.Event(k / 10, 0, k, 0, 0.0, math.nan, 1.0 / (k + 1) if k % 4 == 3 else math.nan, 0.1))
    complete(page(Single(trace, RESULT), tmp_path))
    assert {path.stem for path in tmp_path.glob("*.png")} == {"loss", "staleness"}


def test_a_name_is_no_formula(comparison: Comparison, tmp_path: Path) -> None:
    """Labels of methods and names of figures are anybody's, and matplotlib takes what is between dollars for TeX."""
    label = r"mine $\foo$ and $x"
    first, *others = comparison.header["methods"].items()
    header = comparison.header | {"methods": {label: first[1], **dict(others)}}
    cells = [replace(c, key=c.key._replace(label=label)) if c.key.label == first[0] else c for c in comparison.cells]
    assert r"mine $\foo$ and $x" in complete(page(Comparison(header, cells), tmp_path))
    trace = ob.Trace({"method": "ASGD()", "problem": "P()"})
    trace.add(ob.Event(0.0, 0, 0, 0, 0.1, 0.2, 0.3, extra={r"$\foo$": 1.0}))
    trace.note(ob.trace.Evaluation(0.0, 1, {r"$\bar$": 1.0}))
    complete(page(Single(trace, RESULT), tmp_path))


def test_a_cut_trace_is_said_on_the_page(tmp_path: Path) -> None:
    run = single(ob.methods.ASGD())
    run.trace.write(tmp_path / "trace.jsonl")
    (tmp_path / "summary.json").write_text(json.dumps(RESULT))
    text = (tmp_path / "trace.jsonl").read_text()
    (tmp_path / "trace.jsonl").write_text(text[:-9])
    with pytest.warns(UserWarning, match="is cut"):
        result = load(tmp_path)
    assert "is cut, as after a power cut" in html.unescape(complete(page(result, tmp_path)))


def test_what_is_written_is_json(comparison: Comparison, tmp_path: Path) -> None:
    """The comparison of a run that blew up too: ``NaN`` is none."""
    comparison.cells[0].figures["odd"] = math.nan
    comparison.write(tmp_path)
    del comparison.cells[0].figures["odd"]

    def refused(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=refused)
    read = load(tmp_path)
    assert isinstance(read, Comparison)
    assert math.isnan(read.cells[0].figures["odd"])


@pytest.mark.parametrize("name", NEEDED)
def test_a_comparison_without_a_part_of_its_header_is_named(comparison: Comparison, tmp_path: Path, name: str) -> None:
    header = {key: value for key, value in comparison.header.items() if key != name}
    Comparison(header, []).write(tmp_path)
    with pytest.raises(ValueError, match=rf"comparison\.json is not what .*its header has no {name}"):
        load(tmp_path)


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


@pytest.mark.parametrize(("low", "high"), [(2.1, 4.9), (1.0, 1.4), (0.2, 300.0), (5.0, 5.1)])
def test_a_logarithmic_axis_has_a_few_numbers_however_little_it_spans(low: float, high: float) -> None:
    axes = Figure().add_subplot()
    axes.set_xlim(low, high)
    report._even(axes, whole=False)
    ticks = axes.xaxis.get_major_locator()()
    assert 1 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)

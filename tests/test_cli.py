"""The command line: what each command leaves, every bad input told at once in a few words, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from crew import until

import offbeat as ob
import offbeat.cli.flags
import offbeat.cli.launch
import offbeat.cli.run
import offbeat.cli.simulate
from offbeat import cli
from offbeat.core.values import parse
from offbeat.experiment import Comparison, rerun
from offbeat.tasks import TASKS

QUICK = ["--task", "quadratic", "--gradients", "60"]
ROOT = Path(ob.__file__).parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")


def offbeat(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "offbeat", *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=240, check=False)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a bad input is told, in words with single spaces between them."""
    try:
        status = cli.main(argv)
    except SystemExit as end:  # tyro's own errors
        status = end.code  # type: ignore[assignment]
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert list(Path().iterdir()) == []  # and nothing was begun
    return " ".join(captured.err.replace("│", " ").split())


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a good input is told, in words with single spaces between them."""
    try:
        status = cli.main(argv)
    except SystemExit as end:  # tyro's help
        status = end.code  # type: ignore[assignment]
    assert status == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


# methods, and help


def test_methods_lists_every_method_with_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["methods"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for cls in ob.methods.all_methods():
        assert cls.__name__ in lines[cls.name]
    assert " server " in lines["gem"]
    assert " gossip " in lines["d-psgd"]
    assert " periodic " in lines["local-sgd"]


def test_methods_tells_everything_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "methods", "gem")
    assert "arXiv:1805.08469" in text
    assert "kappa 1.0 Energy granted" in text
    assert "weight_decay 0.0 L2 penalty" in text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--help")
    for name in cli.COMMANDS:
        assert f" {name} " in text
    assert told(capsys, "--version") == f"offbeat {ob.__version__}"


def test_help_of_simulate_names_every_method_and_task_and_the_default_s_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = told(capsys, "simulate", "--help")
    for cls in ob.methods.all_methods():
        assert cls.name in text
    for part in (*ob.tasks.TASKS, "--workers", "--momentum", "--hidden", "--speed", "--seed", "(default: dana-zero)"):
        assert part in text
    assert "--task.seed" not in text  # one seed for all


@pytest.mark.parametrize("method", [cls.name for cls in ob.methods.all_methods()])
def test_help_of_simulate_has_the_method_s_own_flags(capsys: pytest.CaptureFixture[str], method: str) -> None:
    text = told(capsys, "simulate", "--method", method, "--help", "--task", "quadratic")
    for field in fields(ob.methods.find(method)):
        flag = field.name.replace("_", "-")
        assert f" --{flag} " in text or f" --method.{flag} " in text
    assert "--condition" in text


def test_help_of_compare_is_the_grid_s(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "compare", "--help")
    for part in ("`offbeat methods`", "--workers", "--seeds", "--weight-decay", "--jobs", "asgd nag-asgd multi-asgd"):
        assert part.strip("`") in text


# simulate


def test_simulate_leaves_trace_summary_and_page(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", "--method", "gem", *QUICK, "--workers", "3", "--kappa", "2", "--lr", "0.02 * Warmup(20)"]
    argv += ["--speed", "Gamma(cv=0.2, machine_cv=0.6)", "--events", "Crash(1, 3.0)", "--seed", "7", "--d", "5"]
    text = told(capsys, *argv)
    folder = Path("runs/gem-quadratic-3w")
    assert f"page: {folder / 'index.html'}" in text
    trace = ob.Trace.read(folder / "trace.jsonl")
    method = ob.methods.GEM(0.02 * ob.Warmup(20), kappa=2.0)
    cluster = ob.Cluster(3, ob.Gamma(cv=0.2, machine_cv=0.6), (ob.Crash(1, 3.0),))
    run = ob.simulate(method, ob.tasks.Quadratic(d=5, seed=7), cluster, gradients=60, seed=7, evaluate_every=3)
    assert trace == run.trace == rerun(trace).trace
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["figures"] == run.summary()
    assert summary["command"].startswith("offbeat simulate --method gem --task quadratic")
    assert (folder / "loss.png").is_file()


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.simulate, "page", lambda result, folder: None)


@pytest.mark.usefixtures("_no_page")
def test_simulate_warms_up_over_a_part_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "simulate", "--method=DanaZero", "--warmup", "0.5", *QUICK, "--out", "x")
    method = parse(ob.Trace.read("x/trace.jsonl").header["method"], {**vars(ob.methods), **vars(ob)})
    assert method == ob.methods.DanaZero(0.05 * ob.Warmup(30))


@pytest.mark.usefixtures("_no_page")
@pytest.mark.parametrize("way", ["lanes", "abreast"])
def test_simulate_takes_gradients_as_it_is_told(capsys: pytest.CaptureFixture[str], way: str) -> None:
    argv = ["--task", "digits", "--gradients", "40", "--evaluations", "2", "--workers", "4"]
    told(capsys, "simulate", *argv, f"--{way}", "3", "--out", "x")
    trace = ob.Trace.read("x/trace.jsonl")
    assert {name: trace.header[name] for name in ("lanes", "abreast")} == {"lanes": 1, "abreast": 1} | {way: 3}
    assert rerun(trace).trace == trace


@pytest.mark.usefixtures("_no_page")
def test_what_is_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--task", "digits", "--gradients", "40", "--lanes", "auto", "--workers", "4"]
    text = told(capsys, "simulate", *argv, "--out", "x")
    header = ob.Trace.read("x/trace.jsonl").header
    way = "abreast" if header["abreast"] > 1 else "lanes"
    assert f"--{way} {header[way]}," in text
    text = told(
        capsys, "compare", "--methods", "asgd", "--seeds", "0", "--evaluations", "1", "--jobs", "1", *argv, "--out", "y"
    )
    lanes = max(cell.trace.header["lanes"] for cell in Comparison.read("y").cells)
    assert f"of 4 workers were taken in up to {lanes} lanes" in text


@pytest.mark.usefixtures("_no_page")
def test_a_field_that_a_flag_hides_keeps_its_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "simulate", "--method", "ssp", "--method.method", "DanaZero(0.02)", *QUICK, "--out", "x")
    assert "SSP(method=DanaZero(lr=0.02" in ob.Trace.read("x/trace.jsonl").header["method"]


def test_a_run_that_diverges_keeps_its_trace(tmp_path: Path) -> None:
    done = offbeat("simulate", "--method", "asgd", *QUICK, "--lr", "1e30", "--out", "x")
    assert done.returncode == 3
    assert "ASGD diverged at worker" in done.stderr
    assert "the trace until then is x/trace.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < len(ob.Trace.read("x/trace.jsonl")) < 60
    assert json.loads(Path("x/summary.json").read_text())["failure"] == "Diverged"
    assert "diverged at worker" in Path("x/index.html").read_text()


def test_without_matplotlib_only_the_page_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "offbeat.report", raising=False)
    monkeypatch.delattr(ob, "report", raising=False)
    assert cli.main(["simulate", *QUICK, "--out", "x"]) == 0
    assert "pip install 'offbeat[report]', then offbeat report x" in capsys.readouterr().err
    assert sorted(path.name for path in Path("x").iterdir()) == ["summary.json", "trace.jsonl"]
    assert cli.main(["report", "x"]) == 2
    assert "pip install 'offbeat[report]'" in capsys.readouterr().err


# compare and report


def test_compare_leaves_results_that_report_draws_again(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", *QUICK, "--methods", "asgd", "gem(kappa=2.0)", "asgd(lr=1e30)", "--workers", "1", "2"]
    text = told(capsys, *argv, "--seeds", "3", "--jobs", "1", "--out", "x")
    assert "method workers loss distance train loss lag gap seconds speed-up failed" in text
    assert "asgd(lr=1e30) 2 - - - - - - - Diverged 1 of 1" in text
    comparison = Comparison.read("x")
    assert [len(comparison.cells), comparison.header["command"][:15]] == [6, "offbeat compare"]
    first = Path("x/index.html").read_bytes()
    Path("x/index.html").unlink()
    assert told(capsys, "report", "x") == "page: x/index.html"
    assert Path("x/index.html").read_bytes() == first


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_ctrl_c_ends_all_processes_and_keeps_what_is_done() -> None:
    argv = [
        "compare",
        "--task",
        "quadratic",
        "--methods",
        "asgd",
        "--workers",
        "2",
        "--gradients",
        "2000",  # long enough that the other nine tenths are not done before the signal comes
        "--jobs",
        "2",
    ]
    command = [sys.executable, "-m", "offbeat", *argv, "--seeds", *map(str, range(200)), "--out", "x"]
    # a shell that has begun the tests in the background lets them ignore it
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeded
    ) as process:
        assert process.stderr is not None
        assert "of 400,000 gradients" in process.stderr.readline()  # a tenth is done
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=300) == 130
    assert rest.splitlines()[-1] == "offbeat: interrupted"
    assert "of 200 runs are kept: offbeat report x" in rest
    assert "Traceback" not in rest
    assert 20 <= len(Comparison.read("x").cells) < 200

    def left() -> list[str]:
        running = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
        ours = [line for line in running.stdout.splitlines() if line.split()[0] == str(process.pid)]
        return [line for line in ours if not line.split()[1].startswith("Z")]

    until(lambda: not left(), "the end of all processes of the command")


# folders, names and scripts


@pytest.mark.usefixtures("_no_page")
@pytest.mark.parametrize("command", ["simulate", "compare --jobs 1 --methods asgd --workers 1"])
def test_results_are_not_written_over_by_those_of_another_command(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    argv = [*command.split(), "--task", "quadratic", "--gradients", "20"]

    def left() -> dict[str, str]:
        return {str(p): p.read_text() for p in Path().rglob("*.json*")}

    told(capsys, *argv, "--out", "x")
    first = left()
    told(capsys, *argv, "--out", "x")  # the same once more
    assert left() == first
    assert cli.main([*argv, "--d", "3", "--out", "x"]) == 2
    assert "x holds a run already: name another folder with --out" in capsys.readouterr().err
    assert left() == first
    for d in ("3", "4"):
        told(capsys, *argv, "--d", d)
    assert len({path.parent for path in Path("runs").glob("*/*.json")}) == 2


@pytest.mark.parametrize(
    "name", ["x[/y]", "[bold]x", os.fsdecode(b"B\xfccher")], ids=["closes markup", "opens markup", "is no UTF-8"]
)
def test_any_name_of_a_folder_is_shown(capsys: pytest.CaptureFixture[str], name: str) -> None:
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    assert f"{shown}/index.html" in told(capsys, "simulate", *QUICK, "--out", name)
    assert (Path(name) / "index.html").is_file()
    assert cli.main(["simulate", *QUICK, "--d", "3", "--out", name]) == 2
    assert f"{shown} holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "script"),
    [
        ("--workers 2 train.py --epochs 3", "train.py --epochs 3"),
        ("--resume ./start --resume", "./start --resume"),
        ("--no-resume ./start", "./start"),
        ("--out start -m package.train --out x", "-m package.train --out x"),
        ("--out=x start", "start"),
        ("--augment start", "start"),
        ("--import start methods train.py", "train.py"),
        ("--workers 2 -- sub/none a", "sub/none a"),
        ("--out start", ""),
    ],
)
def test_where_a_script_begins(line: str, script: str) -> None:
    """At the first word that is no value of a flag, and is a file or ends in .py."""
    Path("start").touch()
    before, after = cli.flags._script(cli.launch.Launch, line.split())
    assert " ".join(after) == script
    assert [*before, *after] == [word for word in line.split() if word != "--"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("launch none.py", "none.py: there is no such file"),
        ("launch -m nowhere.train", "-m nowhere.train: there is no module nowhere in this folder or installed"),
        ("launch -m", "-m: name a module"),
        ("launch --import nowhere train.py", "No module named 'nowhere'"),
    ],
)
def test_a_script_or_module_that_is_not_there(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert message in refused(capsys, *argv.split())


def test_a_class_of_one_s_own_is_read_where_its_module_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine_alone.py").write_text(
        "import dataclasses, offbeat as ob\n"
        "@dataclasses.dataclass(frozen=True)\nclass MineAlone(ob.methods.ASGD):\n    'Mine.'\n"
        "@dataclasses.dataclass(frozen=True)\nclass DanaZero(ob.methods.ASGD):\n    'Another.'\n"
    )
    monkeypatch.syspath_prepend(".")
    with pytest.raises(
        ValueError, match=r"unknown constructor 'MineAlone'.*start `offbeat launch`.*with --import methods"
    ):
        cli.run._read("MineAlone(lr=0.1)")
    cli.flags.load(["mine_alone"])
    assert repr(cli.run._read("MineAlone(lr=0.1)")).startswith("MineAlone(lr=0.1")
    assert type(cli.run._read("DanaZero()")) is ob.methods.DanaZero


# bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("smulate", "unknown command 'smulate': did you mean simulate"),
        ("methods dana-zer", "unknown method 'dana-zer': did you mean dana-zero"),
        ("simulate --method dana-zer", "unknown method 'dana-zer': did you mean dana-zero"),
        ("simulate --task digts", "unknown task 'digts': did you mean digits"),
        ("simulate --workers 0", "Cluster.workers = 0: must be a whole number, at least 1"),
        ("simulate --workers two", "two"),
        ("simulate --gradients 0", "gradients = 0: must be"),
        ("simulate --lr -1", "DanaZero.lr = -1: must be a finite number above 0"),
        ("simulate --momentum 1", "DanaZero.momentum = 1.0: must be in [0, 1)"),
        ("simulate --warmup 2", "Simulate.warmup = 2.0: must be in [0, 1]"),
        ("simulate --lr Wrmup(3)", "unknown constructor 'Wrmup': did you mean Warmup"),
        ("simulate --lr Warmup(stps=3)", "unexpected keyword argument 'stps'"),
        ("simulate --correction GapPenalty(decay=2)", "GapPenalty.decay = 2: must be in [0, 1)"),
        ("simulate --correction 3", "must be a Correction such as GapPenalty()"),
        ("simulate --speed Gamma(mean=0)", "Gamma.mean = 0: must be finite and above 0"),
        ("simulate --events Join(1,3.0)", "worker 1 is there already"),
        ("simulate --batch 0", "Digits.batch = 0: choose 1 to 1437"),
        ("simulate --wrkers 3", "Perhaps you meant: --workers INT"),
        ("simulate --method d-psgd --workers 1 --topology Ring", "cannot read 'Ring'"),
        ("simulate --task mnist", "MNIST: train-images-idx3-ubyte is missing"),
        ("compare --task mnist", "MNIST: train-images-idx3-ubyte is missing"),
        ("compare --methods asgd gem(kapa=2)", "unexpected keyword argument 'kapa'"),
        ("compare --methods asgd asgd", "one of them is there twice"),
        ("compare --workers 1 0", "Cluster.workers = 0"),
        ("compare --jobs 0", "Compare.jobs = 0: must be at least 1"),
        ("report nowhere", "nowhere has neither comparison.json nor summary.json: give a folder"),
    ],
)
def test_bad_input_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: str, message: str
) -> None:
    monkeypatch.setenv("OFFBEAT_DATA", str(tmp_path / "no-data"))
    assert message in refused(capsys, *argv.split())


@pytest.mark.parametrize("command", ["simulate", "compare"])
@pytest.mark.parametrize("folder", ["taken/x", "taken", "/proc/nowhere/x"])
def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], command: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("taken").write_text("a file")
    monkeypatch.setattr(cli.simulate.Simulation, "run", lambda self: pytest.fail("it ran"))
    assert cli.main([command, "--task", "quadratic", "--out", folder]) == 2
    assert f"the folder {folder} cannot be written to" in capsys.readouterr().err


def test_a_corrupt_data_file_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path("data/mnist")
    data.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (data / f"{name}-ubyte").write_bytes(b"not an idx file")
    monkeypatch.setenv("OFFBEAT_DATA", "data")
    for command in ("simulate", "compare"):
        assert cli.main([command, "--task", "mnist"]) == 2
        error = capsys.readouterr().err
        assert "data/mnist/train-images-idx3-ubyte: starts with" in error
        assert "Delete the file and fetch it again" in error
    assert not Path("runs").exists()


def test_an_unexpected_error_still_has_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.simulate.Simulation, "run", lambda self: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["simulate", *QUICK])


def test_bad_input_ends_the_process_with_status_2() -> None:
    done = offbeat("simulate", "--method", "dana-zer")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("offbeat: unknown method 'dana-zer': did you mean dana-zero")


def test_without_its_extra_the_command_line_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['tyro'] = None; from offbeat.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert done.stderr == "offbeat's command line needs tyro: pip install 'offbeat[cli]'\n"


# a new method

NEW = '''"""Halves: a step half as long."""

from dataclasses import dataclass

from ..core.schedule import Rate
from .asgd import ASGD


@dataclass(frozen=True)
class HalfStep(ASGD):
    """Steps half as long.

    Nobody. Nowhere.
    Differences from the paper: there is none.
    """

    share: float = 0.5
    """What is left of a step."""

    def move(self, x, shared, mine, d, lr):
        return super().move(x, shared, mine, self.share * d, lr)
'''


def test_a_new_file_in_the_methods_folder_is_there_at_once(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "src" / "offbeat", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src" / "offbeat" / "methods" / "half_step.py").write_text(NEW)
    path = str(tmp_path / "src")
    assert "half-step" in offbeat("methods", PYTHONPATH=path).stdout
    done = offbeat("simulate", "--method", "half-step", "--share", "0.25", *QUICK, "--out", "x", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "HalfStep(" in ob.Trace.read("x/trace.jsonl").header["method"]


def test_tasks_lists_every_task_and_its_data() -> None:
    """What each needs, and where it was looked for."""
    done = subprocess.run([sys.executable, "-m", "offbeat", "tasks"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in TASKS)
    assert "needs no files" in done.stdout

"""Formats carry numbers: another version is told from damage, and refused with both numbers and the cure."""

from __future__ import annotations

import json
import re
import socket
import threading
from pathlib import Path

import pytest
import torch
from crew import heard

import offbeat as ob
from offbeat import cli, formats
from offbeat.cli.command import Refused, told
from offbeat.experiment import Comparison
from offbeat.formats import OtherVersion, check
from offbeat.names import read
from offbeat.runtime import snapshot
from offbeat.runtime.coordinator import resumed
from offbeat.runtime.host import Terms
from offbeat.runtime.link import GREETING, LinkLost, accept, dial, listen
from offbeat.runtime.protocol.wire import Corrupt, Kind


def test_a_format_is_known_another_version_refused_and_anything_else_none() -> None:
    assert check("offbeat trace 3", "offbeat trace 3", "x")
    for none in (
        "offbeat snapshot 3",
        "offbeat trace",
        "offbeat trace -1",
        "offbeat trace 3 4",
        "offbeat trace 3\xa0",
        "",
        None,
        3,
    ):
        assert not check(none, "offbeat trace 3", "x")
    with pytest.raises(OtherVersion) as newer:
        check("offbeat trace 12", "offbeat trace 3", "the file x", "7.0.1")
    assert str(newer.value) == (
        f"the file x has the format 'offbeat trace 12', written by offbeat 7.0.1, and offbeat {ob.__version__} knows "
        "'offbeat trace 3': install a newer offbeat, or read it with the version that wrote it, or run again with this one"
    )
    with pytest.raises(OtherVersion, match=r"knows 'offbeat trace 3': read it with the version that wrote it, or run"):
        check("offbeat trace 2", "offbeat trace 3", "the file x")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a small run."""
    assert cli.main(["simulate", "--task", "quadratic", "--gradients", "20", "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("number", [0, 2, 10])
def test_a_trace_of_another_version(run: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "trace.jsonl"
    header, *rest = path.read_text().splitlines()
    other = json.loads(header) | {"format": f"offbeat trace {number}"}
    other["versions"] = other["versions"] | {"offbeat": "9.8.7"}
    path.write_text("\n".join([json.dumps(other), *rest]) + "\n")
    with pytest.raises(OtherVersion, match=rf"'offbeat trace {number}', written by offbeat 9\.8\.7, and offbeat"):
        ob.Trace.read(path)
    with pytest.raises(OtherVersion):
        ob.Cluster.from_trace(path)
    capsys.readouterr()
    for command in ("report", "replay"):
        assert cli.main([command, str(run)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{path}: it has the format 'offbeat trace {number}'" in said
        assert "the version that wrote it" in said


def test_a_comparison_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"format": "offbeat comparison 2"}')
    with pytest.raises(OtherVersion, match=r"'offbeat comparison 2', and offbeat .* knows 'offbeat comparison 1'"):
        Comparison.read(tmp_path)


def renumber(path: Path, number: int) -> None:
    """Let the snapshot be of another version, whole and all."""
    content = path.read_bytes()
    path.write_bytes(content.replace(formats.SNAPSHOT.encode(), f"offbeat snapshot {number}".encode(), 1))


@pytest.mark.parametrize("number", [0, 2, 10])
def test_a_snapshot_of_another_version_is_not_passed_over(tmp_path: Path, number: int) -> None:
    """To go on from the one before, or to begin anew, would lose the run without a word."""
    old, new = (snapshot.write(tmp_path, n, {"x": torch.ones(3)}) for n in (1, 2))
    renumber(new, number)
    said: list[str] = []
    with pytest.raises(OtherVersion, match=f"'offbeat snapshot {number}', and offbeat .* knows 'offbeat snapshot 1'"):
        snapshot.newest(tmp_path, heard(said))
    assert said == []
    new.write_bytes(b"offbeat snapshot two\n" * 9)  # which is damage
    found = snapshot.newest(tmp_path, heard(said))
    assert found is not None
    assert found[0] == old
    assert len(said) == 1


def test_resume_refuses_a_snapshot_of_another_version(tmp_path: Path) -> None:
    renumber(snapshot.write(tmp_path / "snapshots", 1, {"x": torch.ones(3)}), 2)
    with pytest.raises(Refused, match="offbeat snapshot 2"), told():
        resumed(Terms(None, None, 1), tmp_path, read, heard())


@pytest.mark.parametrize("number", [0, 2, 99_999])
def test_both_ends_of_a_link_say_that_they_speak_other_protocols(number: int) -> None:
    """Each names both numbers; a dialler is not told of a lost link, which it would dial again for a minute."""
    theirs = GREETING.replace(b"protocol 1", b"protocol %d" % number)[: len(GREETING) - 1].rstrip(b"\n")
    greeting = theirs.ljust(len(GREETING) - 1) + b"\n"
    with listen("127.0.0.1") as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def answer() -> None:
            with listener.accept()[0] as sock:
                sock.recv(len(GREETING) + 32, socket.MSG_WAITALL)
                sock.sendall(greeting + bytes(32))
                sock.recv(1)  # until the other end has gone

        other = threading.Thread(target=answer)
        other.start()
        with pytest.raises(OtherVersion) as refused:
            dial(address, "t" * 16, "the server", 20.0)
        other.join()
    assert not isinstance(refused.value, LinkLost | Corrupt)
    assert f"the server at {address} speaks 'offbeat protocol {number}', and" in str(refused.value)
    assert str(refused.value).endswith("here 'offbeat protocol 1': install the same version of offbeat at both ends")

    with (
        listen("127.0.0.1") as listener,
        socket.create_connection(listener.getsockname()) as its,
        listener.accept()[0] as mine,
    ):
        its.sendall(greeting + bytes(32))
        with pytest.raises(Corrupt, match=f"the worker speaks 'offbeat protocol {number}', and offbeat"):
            accept(mine, "t" * 16, "the worker", 20.0)
        assert its.recv(len(GREETING), socket.MSG_WAITALL) == GREETING  # by which the other end can tell as well


def test_the_page_of_the_protocol_has_every_kind_of_frame() -> None:
    page = (Path(__file__).parents[1] / "docs/protocol.md").read_text("utf-8")
    assert {kind.name for kind in Kind} == set(re.findall(r"^\| `([A-Z]+)` \|", page, re.MULTILINE))

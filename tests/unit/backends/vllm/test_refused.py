"""A refusal in a process of an engine reaches the process that starts it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from trimtab.backends.vllm.refused import _FILE, listening, telling
from trimtab.errors import BackendError, SiteError


@telling()
def refuse(message: str) -> None:
    raise SiteError(message)


def test_a_refusal_of_another_process_is_raised_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_FILE, "outer")
    with listening() as refusal:
        assert refusal() is None
        folder = Path(os.environ[_FILE]).parent
        worker = multiprocessing.get_context("spawn").Process(target=refuse, args=("no layer 7",))
        worker.start()
        worker.join()
        assert worker.exitcode == 1
        found = refusal()
        assert type(found) is SiteError
        assert str(found) == "no layer 7"
        assert [one.name for one in folder.iterdir()] == ["refusal.json"]
    assert os.environ[_FILE] == "outer"
    assert not folder.exists()


def test_where_nobody_listens_a_refusal_is_only_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_FILE, raising=False)
    with pytest.raises(SiteError):
        refuse("a")
    monkeypatch.setenv(_FILE, str(tmp_path / "gone" / "refusal.json"))
    with pytest.raises(SiteError):
        refuse("a")
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_FILE, raising=False)
    with listening() as refusal:
        with pytest.raises(ZeroDivisionError), telling():
            1 / 0  # noqa: B018
        assert refusal() is None
        Path(os.environ[_FILE]).write_text('["NoSuchKind", "b"]')
        assert type(refusal()) is BackendError
    assert _FILE not in os.environ

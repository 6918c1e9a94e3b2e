"""What one process of several does for all of them."""

from types import SimpleNamespace

import pytest

from dcdit.evaluation.search import write_log
from dcdit.runtime.processes import print_once


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_prints_and_writes_the_log_of_a_search(rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    print_once("Budget: drop fraction 0.5")
    path = write_log(SimpleNamespace(out=tmp_path), ["round 1"])
    assert capsys.readouterr().out == ("" if rank else "Budget: drop fraction 0.5\n")
    assert path.exists() is (rank == 0)

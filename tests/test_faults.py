"""Several processes fail: one message of the cause. What a launch makes of that: tests/launched."""

from __future__ import annotations

import pytest

from align.distributed.worker_errors import WorkerError, read_worker_errors, root_causes, worker_error_of, write


def fault(text, kind, rank, when, trace=""):
    return WorkerError(text, 2 if kind == "users" else 1, kind, trace, rank, when)


def test_faults_come_back_from_the_folder_as_they_were_left(tmp_path):
    left = [fault("a", "users", 1, 2.0), fault("b", "ours", 0, 1.0, "Traceback ...")]
    for one in left:
        write(one, tmp_path)
    assert read_worker_errors(tmp_path) == left[::-1]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        # The same in both: once, and not as that of a certain process.
        ([fault("bad", "users", 1, 1.0), fault("bad", "users", 0, 2.0)], ["bad"]),
        # Different ones: each with the process that has it.
        ([fault("bad", "users", 1, 1.0), fault("worse", "users", 2, 2.0)], ["process 1: bad", "process 2: worse"]),
        # A crash after a fault of the user's follows from it; one before it does not.
        ([fault("bad", "users", 1, 1.0), fault("E", "ours", 0, 2.0, "T")], ["process 1: bad"]),
        ([fault("E", "ours", 0, 1.0, "T"), fault("bad", "users", 1, 2.0)], ["process 0: T", "process 1: bad"]),
        # Of several crashes the first; of lost connections one, and only where nothing else is known.
        ([fault("E1", "ours", 1, 1.0, "T1"), fault("E2", "ours", 0, 2.0, "T2")], ["process 1: T1"]),
        ([fault("lost", "neighbour", 0, 1.0), fault("E", "ours", 1, 2.0, "T")], ["process 1: T"]),
        ([fault("lost", "neighbour", 0, 1.0), fault("lost", "neighbour", 1, 2.0)], ["process 0: lost"]),
        ([], []),
    ],
)
def test_the_cause_is_said_once(faults, message):
    assert [one.message for one in root_causes(faults)] == message


def test_a_lost_connection_is_the_neighbours_fault_only_where_there_is_a_neighbour(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch_says = RuntimeError("Connection closed by peer [127.0.0.1]:4711")
    assert worker_error_of(torch_says).kind == "ours"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert worker_error_of(torch_says).kind == "neighbour"
    assert worker_error_of(RuntimeError("shapes do not match")).kind == "ours"
    assert worker_error_of(OSError(28, "No space left on device")).kind == "users"

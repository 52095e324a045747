import os
import signal
import threading
import time

import pytest

from rewarm.rollouts.sandbox import Outcome, Sandbox, SandboxError
from tests.rollouts.test_confinement import run
from tests.rollouts.test_sandbox_child import children, gone

RUN, NUMBER = "tests.rollouts.unsafe.make_run", "tests.rollouts.unsafe.make_number"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(RUN, num_workers=2, memory_bytes=200 << 20) as sandbox:
        yield sandbox


def test_outcomes_are_in_the_order_of_items(sandbox):
    outcomes = sandbox.map([f"value = {number}" for number in range(300)])
    assert outcomes == [Outcome(number) for number in range(300)]
    assert sandbox.map([]) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("while True: pass", "time"),
        ("9**9**9", "time"),
        ("value = 'a' * 10**12", "memory"),
        ("value = []\nwhile True: value.append('a' * 10**6)", "memory"),
        ("ctypes.string_at(0)", "died"),
        ("import os; os._exit(0)", "died"),
        ("import os; os.write(3, bytes(100))", "died"),
        ("import os; os.write(3, b'\\xff' * 100)", "died"),
        ("import os; os.write(3, bytes([0, 0, 0, 2]) + b'[]')", "died"),
        ("import os; os.write(3, bytes([0, 0, 0, 13]) + b'{\"problem\": 1}')", "died"),
        ("import os; os.close(3)", "died"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("value = {1}", "the result is no JSON"),
        ("value = 'a' * 10**7", "the result is too long"),
        ("value = []\nfor _ in range(10**5): value = [value]", "the result is no JSON"),
    ],
)
def test_a_bad_item_costs_itself_alone(text, problem, sandbox):
    outcomes = sandbox.map(["value = 1", text, "value = 2"], timeout=0.4)
    assert [outcome.value for outcome in outcomes] == [1, None, 2]
    assert outcomes[1].problem == problem


def test_time_is_that_of_the_processor_and_ten_times_as_much_by_the_clock():
    with Sandbox(NUMBER, num_workers=1) as sandbox:
        assert sandbox.map([0.5], timeout=0.1) == [Outcome(0)]
        began = time.monotonic()
        assert sandbox.map([30.0], timeout=0.1) == [Outcome(problem="time")]
        assert 0.9 < time.monotonic() - began < 5


@pytest.mark.parametrize("item", ["crash if not fresh", "memory if not fresh"])
def test_an_outcome_does_not_depend_on_what_came_before(item):
    with Sandbox(NUMBER, num_workers=1) as sandbox:
        assert sandbox.map(["a", "b", item, "c"]) == [Outcome(0), Outcome(1), Outcome(0), Outcome(1)]


def test_workers_are_kept_and_a_closed_sandbox_starts_again():
    sandbox = Sandbox(NUMBER, num_workers=1)
    assert [sandbox.map(["a"])[0].value for _ in range(3)] == [0, 1, 2]
    workers = children(sandbox._process.pid)
    assert len(workers) == 1
    sandbox.close()
    assert gone(workers)
    assert sandbox.map(["a"]) == [Outcome(0)]
    sandbox.close()


def test_threads_share_a_pool(sandbox):
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: sandbox.map([f"value = {n}"] * 20)}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [Outcome(n)] * 20 for n in range(4)}
    # What a thread started must not end with it.
    assert run(sandbox, "value = 1").value == 1


def test_a_forked_process_has_its_own_pool(sandbox):
    sandbox.map(["value = 1"])
    before = set(children(os.getpid()))
    child = os.fork()
    if child == 0:
        right = sandbox.map(["value = 2"]) == [Outcome(2)]
        sandbox.close()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert before <= set(children(os.getpid()))
    assert sandbox.map(["value = 3"]) == [Outcome(3)]


def test_a_sandbox_whose_processes_were_killed_starts_again():
    with Sandbox(NUMBER, num_workers=1) as sandbox:
        sandbox.map(["a"])
        workers = children(sandbox._process.pid)
        os.kill(sandbox._process.pid, signal.SIGKILL)
        assert gone(workers)
        assert sandbox.map(["a"]) == [Outcome(0)]


def test_a_keyboard_interrupt_amid_items_ends_the_workers_at_once():
    with Sandbox(RUN, num_workers=2) as sandbox:
        sandbox.map(["value = 1"] * 4)
        main = threading.main_thread().ident
        timer = threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT])
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            sandbox.map(["while True: pass"] * 8, timeout=20)
        assert time.monotonic() - began < 5
        assert sandbox.map(["value = 1"]) == [Outcome(1)]


def test_what_cannot_be_imported_says_why():
    with pytest.raises(
        SandboxError, match="make_nothing cannot be used in a sandbox: RuntimeError: there is noth"
    ):
        Sandbox("tests.rollouts.unsafe.make_nothing").map([1])
    with pytest.raises(SandboxError, match="cannot be used in a sandbox: ModuleNotFoundError"):
        Sandbox("tests.rollouts.nowhere.make").map([1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes is 0; it must be above 0"),
        ({"num_workers": 0}, "num_workers is 0; it must be at least 1"),
    ],
)
def test_limits_out_of_range_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(RUN, **arguments)
    with pytest.raises(ValueError, match=r"timeout is 0; it must be above 0"):
        Sandbox(RUN).map([1], timeout=0)


def test_a_system_without_confinement_is_refused(monkeypatch):
    monkeypatch.setattr("rewarm.rollouts.sandbox._CHILD", UNCONFINED)
    with (
        Sandbox(RUN) as sandbox,
        pytest.raises(SandboxError, match="cannot be confined: the system is plan9"),
    ):
        sandbox.map(["value = 1"])


UNCONFINED = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from rewarm.rollouts import sandbox_child
def confine(readable):
    raise sandbox_child.NoConfinementError("the system is plan9")
sandbox_child.confine = confine
sandbox_child.main(sys.argv[2], *map(int, sys.argv[3:]))
"""

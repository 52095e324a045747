import errno
import os
import platform
import struct

import pytest

from rewarm.rollouts import confinement
from rewarm.rollouts.confinement import ALLOWED, NoConfinementError, confine, filter_program
from rewarm.rollouts.sandbox import Sandbox

pytestmark = pytest.mark.skipif(platform.machine() not in ALLOWED, reason="there is no filter for it")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox("tests.rollouts.unsafe.make_run", num_workers=1) as sandbox:
        yield sandbox


def run(sandbox, text, timeout=5.0):
    (outcome,) = sandbox.map([text], timeout)
    return outcome


ATTEMPTS = {
    "a program": "import os; os.execv('/bin/true', ['true'])",
    "a process": "import os; os.fork()",
    "a command": "import subprocess; subprocess.run(['touch', '{mark}'])",
    "a thread": "import threading; threading.Thread(target=print).start()",
    "a new file": "open('{mark}', 'w')",
    "a longer file": "open('{kept}', 'a')",
    "another file": "open('{kept}', 'r+')",
    "an emptied file": "import os; os.truncate('{kept}', 0)",
    "no file": "import os; os.remove('{kept}')",
    "another name": "import os; os.rename('{kept}', '{mark}')",
    "a link": "import os; os.symlink('{kept}', '{mark}')",
    "a second name": "import os; os.link('{kept}', '{mark}')",
    "a folder": "import os; os.mkdir('{mark}')",
    "other rights": "import os; os.chmod('{kept}', 0)",
    "another time": "import os; os.utime('{kept}')",
    "a socket": "import socket; socket.socket()",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "a pair of sockets": "import socket; socket.socketpair()",
    "a pipe": "import os; os.pipe()",
    "a signal to the trainer": "import os; os.kill({pid}, 0)",
    "a signal by fcntl": "import fcntl; fcntl.fcntl(3, fcntl.F_SETOWN, {pid})",
    "a limit of the trainer": "import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "a higher limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "another folder": "import os; os.chdir('/')",
    "another user": "import os; os.setuid(1)",
    "memory of the trainer": "open('/proc/{pid}/mem', 'rb')",
    "secrets of the trainer": "value = open('/proc/{pid}/environ').read()",
    "own environment": "value = open('/proc/self/environ').read()",
    "passwords": "value = open('/etc/passwd').read()",
    "names of files": "import os; value = os.listdir('{folder}')",
    "what is in a file": "value = open('{kept}').read()",
}


@pytest.mark.parametrize("what", ATTEMPTS)
def test_code_that_runs_in_a_worker_gets_nothing_done(what, sandbox, tmp_path):
    kept, mark = tmp_path / "kept", tmp_path / "mark"
    kept.write_text("as it was")
    before = kept.stat()
    text = ATTEMPTS[what].format(kept=kept, mark=mark, pid=os.getpid(), folder=tmp_path)
    outcome = run(sandbox, text)
    assert outcome.value is None
    assert outcome.problem.startswith(
        ("PermissionError", "RuntimeError: can't start new thread", "ValueError")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept.read_text(), kept.stat().st_mode, kept.stat().st_mtime) == (
        "as it was",
        before.st_mode,
        before.st_mtime,
    )


def test_every_system_call_that_is_not_listed_is_refused(sandbox):
    machine = platform.machine()
    opens = confinement._OPENS[machine]
    # Linux never filters uretprobe and uprobe, which do nothing but serve probes that root has set.
    left = {*ALLOWED[machine].values(), *opens, *({335, 336} if machine == "x86_64" else ())}
    numbers = [n for base in (0, 0x40000000) for n in range(base, base + 600) if n not in left]
    text = f"""
value = []
for number in {numbers}:
    ctypes.set_errno(0)
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != {errno.EPERM}:
        value.append(number)
"""
    assert run(sandbox, text).value == []


@pytest.mark.parametrize("flags", ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"])
def test_a_file_opens_for_reading_alone(flags, sandbox, tmp_path):
    text = "import os; value = os.open(os.__file__, os.O_RDONLY{}); os.close(value)"
    assert run(sandbox, text.format("")).problem is None
    assert run(sandbox, text.format(f" | os.{flags}")).problem.startswith("PermissionError")


def test_a_worker_still_computes_imports_and_takes_memory(sandbox):
    outcome = run(
        sandbox, "import colorsys, fractions; value = [colorsys.rgb_to_hsv(1, 0, 0)[1], len('a' * 10**8)]"
    )
    assert outcome.value == [1.0, 10**8]


def test_nothing_secret_is_in_a_worker(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Sandbox("tests.rollouts.unsafe.make_run", num_workers=1) as sandbox:
        names = run(sandbox, "import os; value = dict(os.environ)").value
    assert "PATH" in names
    assert "secret" not in names.values()


def test_a_program_is_read_instruction_by_instruction():
    def decide(program, arch, number, flags=0):
        steps = [struct.unpack_from("HBBI", program, at) for at in range(0, len(program), 8)]
        data, at, held = struct.pack("IIQ", number, arch, 0) + struct.pack("6Q", *[flags] * 6), 0, 0
        while True:
            code, if_true, if_false, value = steps[at]
            if code == 0x20:
                (held,) = struct.unpack_from("I", data, value)
            elif code == 0x06:
                return value
            else:
                at += if_true if (held == value if code == 0x15 else held & value) else if_false
            at += 1

    for machine, arch in (("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)):
        program = filter_program(machine)
        assert len(program) // 8 < 4096
        for number in range(600):
            listed = number in ALLOWED[machine].values() or number in confinement._OPENS[machine]
            assert decide(program, arch, number) == (0x7FFF0000 if listed else 0x00050001)
        for number in confinement._OPENS[machine]:
            assert decide(program, arch, number, os.O_CLOEXEC) == 0x7FFF0000
            assert decide(program, arch, number, os.O_CREAT | os.O_CLOEXEC) == 0x00050001
        assert decide(program, 0x40000003, 0) == 0x80000000


def test_a_machine_without_a_filter_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "sparc")
    with pytest.raises(NoConfinementError, match="linux on sparc, must be Linux on x86-64 or aarch64"):
        confine([])

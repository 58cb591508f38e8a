"""The keeper: a small process that starts commands for a run, and lets none of them outlive it.

It is started as a script, with nothing but the standard library, and speaks with the run over its standard input, a
socket. To the run belong the decisions; here is what only the parent of a command can do, off the run's event loop:

* Every command gets a session of its own, so that no Ctrl-C of the terminal reaches it, and ``/dev/null`` to read.
* It ends as a whole: whatever it has left behind in its process group is killed before its end is told.
* When the run ends, in whatever way (kill -9 too), all that still runs is killed. It does not depend on the moment: a
  command has no other parent than the keeper, which knows of its group from the first instruction on. What has left the
  group for a session of its own comes to the keeper when its parent ends, and is killed when the run ends.
* When the keeper itself is killed, as the OOM killer picks a process, all that it ran comes to its guard: the process
  that was started, which has forked the keeper and waits for nothing but its end. It kills what is left, and only then
  does the run see its socket closed. If the guard is killed, the keeper ends as with the run. Only who kills both
  at once leaves commands behind. The process of the run itself adopts no orphans: for a program that we are part of,
  that would be a setting of the whole process, with children that it did not start.

A message is its length and a tuple in Python's own `marshal`; both sides are the same interpreter. To the keeper:
``(number, words, most bytes of output)`` to start, ``(number,)`` to kill. From it, once for each command:
``(number, exit code, errno, stdout, end of stderr)``; a signal is a negative exit code, and an errno says that the
command could not be started, or `EFBIG` that it was killed because it wrote too much.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import resource
import selectors
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

PR_SET_CHILD_SUBREAPER = 36
LENGTH = struct.Struct("<I")
READ_BYTES = 1 << 16
STDERR_TAIL_BYTES = 1 << 11
LARGEST_PIPE_READS = 16  # of READ_BYTES: what a pipe can hold, unless root has allowed more
# Python ignores some of them, and we others: a command must find them as every process does.
DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Frames:
    """Messages out of a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Take in some bytes; returns the messages that are whole by now."""
        buffer, messages, start = self._buffer, [], 0
        buffer += data
        while len(buffer) - start >= LENGTH.size:
            end = start + LENGTH.size + LENGTH.unpack_from(buffer, start)[0]
            if end > len(buffer):
                break
            messages.append(marshal.loads(memoryview(buffer)[start + LENGTH.size : end]))
            start = end
        del buffer[:start]
        return messages


def frame(message: tuple[Any, ...]) -> bytes:
    """The bytes of a message."""
    body = marshal.dumps(message)
    return LENGTH.pack(len(body)) + body


class Child:
    """One command that runs.

    :ivar out: what it has written to standard output.
    :ivar err: the end of what it has written to standard error.
    :ivar trouble: why it was killed, or 0.
    :ivar most: so many bytes it may write.
    """

    __slots__ = ("err", "most", "number", "out", "stderr", "stdout", "trouble")

    def __init__(self, number: int, most: int, stdout: int, stderr: int) -> None:
        self.number, self.most, self.stdout, self.stderr = number, most, stdout, stderr
        self.out, self.err, self.trouble = bytearray(), bytearray(), 0


class Keeper:
    """Starts commands, watches them, and ends them all when the run ends.

    :param run: the socket to the run.
    """

    def __init__(self, run: socket.socket) -> None:
        self._run = run
        self._frames = Frames()
        self._children: dict[int, Child] = {}  # by process
        self._processes: dict[int, int] = {}  # by number
        self._selector = selectors.DefaultSelector()
        self._null = os.open(os.devnull, os.O_RDONLY)

    def main(self, lives: list[int]) -> NoReturn:
        """Until the run or the guard has ended.

        :param lives: descriptors of their processes; a fork of the run can keep the socket open longer than the run
            lives.
        """
        _adopt_orphans()
        bell, rope = socket.socketpair()
        os.set_blocking(rope.fileno(), False)
        signal.signal(signal.SIGCHLD, lambda number, stack: None)
        signal.set_wakeup_fd(rope.fileno(), warn_on_full_buffer=False)
        select, register = self._selector.select, self._selector.register
        register(bell, selectors.EVENT_READ, None)
        register(self._run, selectors.EVENT_READ, None)
        for life in lives:
            register(life, selectors.EVENT_READ, None)
        is_alive = True
        while is_alive:
            rings = False
            for key, _ in select():
                if key.data is not None:
                    self._read(*key.data)
                elif key.fileobj is bell:
                    rings = bool(bell.recv(READ_BYTES))
                elif key.fd in lives or not self._obey(self._run.recv(READ_BYTES)):
                    is_alive = False
            if rings:
                self._reap()
        self.end()

    def end(self) -> NoReturn:
        """Kill whatever still runs, and leave."""
        for process in self._children:
            _kill_group(process)
        _kill_children()
        os._exit(0)

    def _obey(self, data: bytes) -> bool:
        """What the run asks for; False when it has closed the socket."""
        for message in self._frames.feed(data):
            if len(message) > 1:
                self._start(*message)
            elif (process := self._processes.get(message[0])) is not None:
                _kill_group(process)
        return bool(data)

    def _start(self, number: int, words: list[bytes], most: int) -> None:
        descriptors: list[int] = []
        try:
            for _ in range(2):
                descriptors += _pipe()
            stdout, stdout_end, stderr, stderr_end = descriptors
            process = os.posix_spawnp(
                words[0],
                words,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, self._null, 0),
                    (os.POSIX_SPAWN_DUP2, stdout_end, 1),
                    (os.POSIX_SPAWN_DUP2, stderr_end, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=DEFAULT_SIGNALS,
            )
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            self._tell(number, 0, error.errno or errno.EIO, b"", b"")
            return
        os.close(stdout_end)
        os.close(stderr_end)
        child = Child(number, most, stdout, stderr)
        self._children[process], self._processes[number] = child, process
        for descriptor in (stdout, stderr):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, (process, child, descriptor))

    def _read(self, process: int, child: Child, descriptor: int) -> bool:
        """Take in what a command has written; False if there is nothing more for now."""
        if descriptor not in (child.stdout, child.stderr):
            return False  # closed since
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close(child, descriptor)
        elif descriptor == child.stderr:
            child.err += data
            del child.err[:-STDERR_TAIL_BYTES]
        elif not child.trouble:
            child.out += data
            if len(child.out) > child.most:
                child.trouble, child.out = errno.EFBIG, bytearray()
                _kill_group(process)
        return bool(data)

    def _close(self, child: Child, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        if descriptor == child.stdout:
            child.stdout = -1
        else:
            child.stderr = -1

    def _reap(self) -> None:
        """Tell of the commands that have ended."""
        while True:
            try:
                # Left a zombie for now: as long as it is one, its number can be no other process's group.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            process = found.si_pid
            if process not in self._children:
                os.waitpid(process, 0)  # an orphan that has come to us
                continue
            _kill_group(process)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            child = self._children.pop(process)
            del self._processes[child.number]
            for descriptor in (child.stdout, child.stderr):
                if descriptor < 0:
                    continue
                for _ in range(LARGEST_PIPE_READS):  # who has left the group may hold it open, and go on writing
                    if not self._read(process, child, descriptor):
                        break
                if descriptor in (child.stdout, child.stderr):
                    self._close(child, descriptor)
            self._tell(child.number, code, child.trouble, bytes(child.out), bytes(child.err))

    def _tell(self, *message: Any) -> None:
        self._run.sendall(frame(message))


def _begin_guarded(run: int) -> list[int]:
    """Fork the keeper, in which this returns; the process that was started stays behind as its guard.

    :param run: the process of the run.
    :returns: what `Keeper.main` takes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the run decides when it is over, also if all are told to end
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a run that ignores it would pass that on, and no wait would end
    _adopt_orphans()
    guard = os.getpid()
    lives = [life for process in (run, guard) if (life := _life_of(process)) is not None]
    if os.getppid() != run:
        os._exit(0)
    keeper = os.fork()
    if keeper:
        os.waitpid(keeper, 0)
        _kill_children()
        os._exit(0)
    return lives


def _life_of(process: int) -> int | None:
    """A descriptor that can be read when the process has ended; None where there are none (before Linux 5.3)."""
    with contextlib.suppress(OSError):
        return os.pidfd_open(process)
    return None


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _adopt_orphans() -> None:
    """Become the parent of what the commands leave behind (Linux)."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_children() -> None:
    """Until there are none: those of a child that has been killed come to us."""
    with contextlib.suppress(OSError):
        while _killed_one_of(_children()):
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read().split()


def _killed_one_of(processes: list[str]) -> bool:
    killed = False
    for process in processes:
        with contextlib.suppress(OSError):  # it may be somebody else's by now, as with sudo
            os.kill(int(process), signal.SIGKILL)
            killed = True
    return killed


def _pipe() -> tuple[int, int]:
    """A pipe. The limit of open files is raised when it is met, and not before: commands inherit it."""
    try:
        return os.pipe()
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        most = soft * 2 if hard == resource.RLIM_INFINITY else min(hard, soft * 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return os.pipe()


if __name__ == "__main__":
    lives = _begin_guarded(int(sys.argv[1]))
    keeper = Keeper(socket.socket(fileno=0))
    try:
        keeper.main(lives)
    except ConnectionError:
        pass  # the run does not listen any more
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        keeper.end()

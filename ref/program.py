"""A program that nobody has to trust: in a process group of its own, with limits on its output and its time."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Self


class ProgramError(Exception):
    """A program that gives no further answer; says why."""


class Program:
    """Asks a program all at once, and reads its answers: blocks of lines, each ended by the line `end`."""

    def __init__(self, command: str | list[str], text: str, most: int, environment: dict[str, str] | None) -> None:
        """A command in the shell's words or a list. It may write `most` bytes to each of its two outputs."""
        self.most = most
        self.process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.pipes = self.process.stdin, self.process.stdout, self.process.stderr
        self.blocks: deque[list[str]] = deque()
        self.lines: list[str] = []  # of the block that has not ended
        self.rest = b""  # of the line that has not ended
        self.said = b""  # the end of what it wrote to its standard error
        # A part of an output, or the sentence that ends the answers; "" where the program ended by itself.
        self.arrived: queue.SimpleQueue[tuple[IO[bytes], bytes] | str] = queue.SimpleQueue()
        try:
            readers = [self.thread(self.read, pipe) for pipe in self.pipes[1:]]
            self.threads = [*readers, self.thread(self.write, text.encode()), self.thread(self.wait, readers)]
        except BaseException:  # no thread can be had, or the checker is told to end
            self.end()
            raise

    def thread(self, function: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        return thread

    def write(self, text: bytes) -> None:
        # A program need not read what it is asked.
        with contextlib.suppress(OSError, ValueError), self.pipes[0] as pipe:
            while text:
                text = text[pipe.write(text) :]

    def read(self, pipe: IO[bytes]) -> None:
        left = self.most
        while part := pipe.read(2**16):
            left -= len(part)
            if left < 0:
                name = "output" if pipe is self.pipes[1] else "error"
                self.arrived.put(f"more than {self.most} bytes of standard {name}, which no right answer needs")
                return
            self.arrived.put((pipe, part))

    def wait(self, readers: list[threading.Thread]) -> None:
        self.process.wait()
        self.end()
        for reader in readers:
            reader.join(1)  # longer only where a process that has left the group keeps the pipe open
        self.arrived.put("")

    def end(self) -> None:
        """End what is left of the program and of all that it started."""
        if sys.platform == "win32":
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:  # else its number may be another's by now
            self.end()
        for thread in self.threads:
            thread.join(1)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()

    def block(self, seconds: float) -> list[str] | None:
        """Lines of the next block, or None where the program ended well. Raises ProgramError and TimeoutError."""
        late = time.monotonic() + seconds
        while not self.blocks:
            try:
                arrived = self.arrived.get(timeout=max(0, late - time.monotonic()))
            except queue.Empty as error:
                raise TimeoutError from error
            if isinstance(arrived, str):
                self.check_end(arrived)
                return None
            pipe, part = arrived
            if pipe is self.pipes[2]:
                self.said = (self.said + part)[-500:]
                continue
            *lines, self.rest = (self.rest + part).split(b"\n")
            for line in lines:
                words = line.decode(errors="replace").strip()
                if words == "end":
                    self.blocks.append(self.lines)
                    self.lines = []
                elif words:
                    self.lines.append(words)
        return self.blocks.popleft()

    def check_end(self, why: str) -> None:
        status = self.process.returncode
        said = self.said.decode(errors="replace").strip()
        if why:
            raise ProgramError(why)
        if status:
            raise ProgramError(f"exit status {status}: {said}" if status > 0 else f"ended by signal {-status}: {said}")
        if self.lines or self.rest.strip():
            raise ProgramError("the answer is cut short")

"""One process at a time works on a run: the one that holds the lock on RUN.lock, which lies beside the run's record.

The operating system has the lock, and takes it back when the process ends, however it ends: a file that a killed
process left behind stops nobody.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from .config import TrainError
from .store import remove_temporaries

if sys.platform == "win32":  # written from its documentation: no test has run there
    import msvcrt

    def lock(file: BinaryIO) -> None:
        file.seek(1 << 30)  # a byte behind the text, which no other process could read if it were locked
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
else:
    import fcntl

    def lock(file: BinaryIO) -> None:
        """Raises BlockingIOError where another process has the lock."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def owned(record_path: Path) -> Iterator[None]:
    """Own the files of the run that has this record, or will have it.

    Raises TrainError where another process is at that work.
    """
    if record_path.suffix != ".jsonl":  # or the name of another file of the run may be that of the record
        raise TrainError(f"{record_path} must be a record, whose name ends in .jsonl")
    path = record_path.with_suffix(".lock")
    with ExitStack() as files:
        while True:
            file = files.enter_context(open(path, "a+b", buffering=0))
            try:
                lock(file)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().decode(errors="replace") or "another process"
                rule = f"works on this run and has the lock {path}: wait until it ends"
                raise TrainError(f"{record_path.stem}: {owner} {rule}") from error
            except OSError as error:
                # NFS has locks among its machines, and Lustre only if mounted so. To refuse would keep runs from a
                # whole cluster, so that its user has to see to it that each is started once.
                print(f"{path} cannot be locked ({error}): start no second process on this run", file=sys.stderr)
                yield
                return
            if is_at(path, file):
                break
            # The owner before removed this file between `open` and `lock`: the next one may have made another.
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            remove_temporaries(record_path)
            yield
        finally:
            # Before the lock is given back, or it could be the file of the next owner. Windows removes no open file.
            if sys.platform != "win32" and is_at(path, file):
                path.unlink()


def is_at(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is the one of this name, and neither removed nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

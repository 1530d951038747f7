"""Files and folders that are complete on the disk or absent; the locks and hashes that go with them. No torch in here."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, cast

from dtl.credentials import bare, is_address
from dtl.errors import UserError

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 1 << 20
# What file systems without locks answer to flock: NFS without a lock service, FUSE, exotic kernels.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
MAX_FILE_BYTES = 1 << 30
"""The default of data.max_file_bytes: the size of a file that is read into memory as a whole."""


@dataclass(frozen=True)
class FileFacts:
    """What a manifest records of a file: its size in bytes and the sha256 of its content."""

    size: int
    sha256: str


def user_path(text: str | os.PathLike[str]) -> Path:
    """A place on this machine's disks that the user named, with ~ expanded. UserError for an address, and where there is no home folder."""
    if is_address(os.fspath(text)):
        raise UserError(f"{bare(os.fspath(text))} is an address, but a file or folder of this machine is needed here; download it and give its path")
    return expand_home(text)


def expand_home(text: str | os.PathLike[str]) -> Path:
    """With ~ expanded. UserError where it is not known: of a user without $HOME and without an entry in /etc/passwd, as in containers."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: the home folder of this user is not known ($HOME is not set); give the whole path") from None


def open_regular(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file (or a link to one) for reading, unbuffered. Never waits for a writer, and never starts a device.

    Raises UserError for what is not a regular file, or is larger than `max_bytes`; OSError where it cannot be opened.
    """
    return open(path, "rb", buffering=0, opener=lambda *_: open_descriptor(path, max_bytes=max_bytes))


def open_descriptor(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> int:
    """`open_regular` for os.pread; the caller closes it."""
    check_regular(path, os.stat(path), max_bytes=max_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(descriptor), max_bytes=max_bytes)  # it may have been exchanged in between
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: str | os.PathLike[str], facts: os.stat_result, *, max_bytes: int | None = None) -> None:
    """UserError unless `facts` are those of a regular file of at most `max_bytes`."""
    if not stat.S_ISREG(facts.st_mode):
        kind = next((name for is_one, name in _KINDS if is_one(facts.st_mode)), "no file")
        raise UserError(f"{os.fspath(path)}: it is {kind}, not a regular file")
    if max_bytes is not None and facts.st_size > max_bytes:
        raise UserError(f"{os.fspath(path)}: it has {facts.st_size:,} bytes, more than the {max_bytes:,} that are allowed for such a file")


def without_path(error: UserError) -> str:
    """What `open_regular` and `read_regular` complain about, where the message names the file already."""
    return str(error).rpartition(": ")[2]


def read_regular(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """All bytes of a regular file; the limit also holds for one that grows, and for one whose size is not known (as in /proc)."""
    with open_regular(path, max_bytes=max_bytes) as file:
        data = bytearray()
        while len(data) <= max_bytes and (block := file.read(min(1 << 20, max_bytes + 1 - len(data)))):
            data += block
    if len(data) > max_bytes:
        raise UserError(f"{os.fspath(path)}: it has more than the {max_bytes:,} bytes that are allowed for such a file")
    return bytes(data)


class NotReplaced(OSError, UserError):
    """A file was to be written where a folder, a device, a pipe or a link to one lies."""

    def __init__(self, path: Path) -> None:
        OSError.__init__(self, errno.EINVAL, "it exists and is not a regular file", str(path))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


def _is_open_stream(path: Path) -> bool:
    """/dev/stdout, /dev/stderr and /dev/fd/N: links to what this process has open, even if that is a regular file."""
    target = os.readlink(path) if path.is_symlink() else ""
    return target.startswith("/proc/self/fd/") or re.fullmatch(r"/proc/\d+/fd", os.path.realpath(path.parent)) is not None


def write_whole(path: Path, write: Callable[[Any], Any], *, sync: bool = True) -> None:
    """`write(file)` under a temporary name, then rename; with `sync` the content reaches the disk before the name does, so a power cut leaves the old file.

    Whoever has the old file open or mapped keeps it whole. Raises OSError; the temporary file is then gone. A device or a pipe is not replaced
    (NotReplaced); what goes to /dev/stdout goes there, and no file takes its place.
    """
    if _is_open_stream(path):
        with path.open("ab") as file:
            write(file)
        return
    if path.exists() and not path.is_file():
        raise NotReplaced(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{temporary_suffix()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around the writing of a file that the user named: what the system refuses is a UserError of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


def write_json_whole(path: Path, value: object) -> None:
    """`write_whole` of a JSON value, indented for people. Numbers that are not finite become null."""
    text = json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def without_nan(value: Any) -> Any:
    """Plain values with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    return [without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def make_folder(folder: Path) -> None:
    """A folder of dtl's own inside a folder that is not; OSError where a link of that name leads elsewhere."""
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise OSError(errno.ENOTDIR, "it is a link, not a folder", str(folder))


def clear_folder(folder: Path, made: re.Pattern[str]) -> None:
    """Delete the entries of these names, and the folder where nothing else is in it. Of a link only the link."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if made.fullmatch(entry.name):
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
        folder.rmdir()


TEMPORARY = r"\..+\.[0-9a-f]{8}"
"""The names that `write_whole` gives its temporary files begin so; `temporary_suffix` ends them."""


def temporary_suffix() -> str:
    """The end of temporary names. It names the node, so that its leftovers are not taken for files that another node is writing."""
    return f".{socket.gethostname()}.tmp"


def fsync_folder(folder: Path) -> None:
    """Make a folder's entries (new files, renames) survive a power cut, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot sync a folder, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def publish(temporary: Path, target: Path, *, made: Collection[str] | None = None) -> None:
    """Give a wholly written folder its name, in place of a folder that may have it now.

    A folder cannot be replaced in one step: the present one is set aside, and `published` finds it there
    should the process be killed between the two renames. `made`: the names that the replaced folder goes with; what else is in it (put there
    by the user) moves to the new one. Without it the folder goes as a whole.
    """
    fsync_folder(temporary)
    aside = _aside(target)
    if target.exists():
        _retire(aside, target, made)
        os.rename(target, aside)
    os.rename(temporary, target)
    fsync_folder(target.parent)
    _retire(aside, target, made)


def _retire(aside: Path, target: Path, made: Collection[str] | None) -> None:
    """Delete a folder that was replaced, but move to `target` what is not `made`."""
    if made is not None and aside.is_dir() and not aside.is_symlink():
        for entry in aside.iterdir():
            if entry.name not in made and not os.path.lexists(target / entry.name):
                os.rename(entry, target / entry.name)
    remove(aside)


def published(target: Path) -> Path:
    """Where the folder named `target` lies: there, or set aside by a `publish` that was killed."""
    aside = _aside(target)
    return aside if not target.exists() and aside.exists() else target


def remove(folder: Path) -> None:
    """Delete a folder with its content, of a link the link alone; one that is not there is fine."""
    with suppress(FileNotFoundError):
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)


def discard(folder: Path) -> None:
    """`remove` after a failure, as far as the disk lets us: the failure itself is what must be reported."""
    with suppress(OSError):
        shutil.rmtree(folder)


def hash_file(path: Path) -> FileFacts:
    """Size and sha256 of a file as it lies on the disk. UserError for what is not a regular file."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))  # one for all: new memory for each chunk costs more than reading
    with cast(io.RawIOBase, open_regular(path)) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileFacts(size, digest.hexdigest())


def sha256_of_file(path: Path) -> str:
    return hash_file(path).sha256


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, type, shape and bytes of each tensor, in the order of their names: the same on every rank that holds the same."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        # As bytes first: NumPy has no bfloat16. A view of one row also works for scalars and for empty tensors.
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def open_lock(path: Path) -> BinaryIO:
    """A file for `flock`, made where it is not there. UserError for what is no regular file: a named pipe would wait, a link make a file elsewhere."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise UserError(f"{path}: it is {'a link' if error.errno == errno.ELOOP else 'a folder'}, not a regular file") from None
        raise
    file = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        check_regular(path, os.fstat(descriptor))
    except BaseException:
        file.close()
        raise
    return cast(BinaryIO, file)


def flock(file: IO[Any] | int, *, wait: bool = True) -> Literal["held", "busy", "none"]:
    """Take the exclusive lock of an open file; the system frees it when the file is closed or its process ends.

    "held": this process has it. "busy": another has it (only with `wait=False`). "none": this file system has no locks, and the caller
    decides what that means. Never remove a lock file: two processes could then hold "the" lock.

    Our own in place of the filelock package: that one raises on ENOLCK and ENOTSUP, falls back to soft locks (which a killed process
    leaves behind) on ENOSYS, and cannot lock a file that is open already; handling these took more lines than this.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return "none"
        raise
    return "held"


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.before")

"""The scratch folder: where copies of what is in buckets lie, and that it is this user's alone."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

_COPIES = "orpo_ray-copies"
# In a folder that this project made: what lies in another one is never deleted.
_MARK = ".made-by-orpo_ray"
_FIX = "set ORPO_RAY_SCRATCH to a folder of your own"


def copies_root() -> Path:
    """The folder of all copies: below ORPO_RAY_SCRATCH, else in the system's temporary folder.

    The part that another user could have made is not resolved: a link there is refused.
    """
    named = os.environ.get("ORPO_RAY_SCRATCH")
    if named:
        return Path(named).expanduser().resolve() / _COPIES
    return Path(tempfile.gettempdir()).resolve() / _default_name() / _COPIES


def _default_name() -> str:
    return f"orpo_ray-{os.getuid()}"


def has_copies(root: Path) -> bool:
    """Whether a folder is one of copies that this project made for this user."""
    mark = root / _MARK
    return mark.is_file() and not root.is_symlink() and root.lstat().st_uid == os.getuid()


def make_own(root: Path, folder: Path) -> None:
    """Make a folder below the root of all copies, each level of it this user's alone.

    Raises:
        PermissionError: for a level that is another user's or a link, where others may write to the
            root, and for a root that this project did not make.
    """
    if root.parent.name == _default_name():
        _make_level(root.parent, is_outer=True)
    else:
        root.parent.mkdir(parents=True, exist_ok=True)
    _make_level(root, is_outer=True)
    found = os.listdir(root)
    # Asked a second time, as another process may just have made both the mark and a folder.
    if found and _MARK not in found and not (root / _MARK).exists():
        raise PermissionError(f"{root} holds files that orpo_ray did not make; {_FIX}")
    if not found:
        (root / _MARK).touch(mode=0o600)
    level = root
    for part in folder.relative_to(root).parts:
        level = level / part
        _make_level(level, is_outer=False)


def _make_level(level: Path, is_outer: bool) -> None:
    """Make one folder, or refuse what is there.

    Args:
        level: its parent exists, and is this user's alone unless `is_outer`.
        is_outer: others may have put something into it while they could write to it.
    """
    with contextlib.suppress(FileExistsError):
        level.mkdir(mode=0o700)
    found = level.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{level} is a link; {_FIX}")
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{level} is no folder; {_FIX}")
    if found.st_uid != os.getuid():
        raise PermissionError(f"{level} is another user's; {_FIX}")
    if is_outer and found.st_mode & 0o022:
        raise PermissionError(f"others may write to {level}; {_FIX}")
    if found.st_mode & 0o077:
        level.chmod(0o700)

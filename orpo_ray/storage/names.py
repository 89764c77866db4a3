"""Names of models, and in buckets and URLs, and which of them may become a path on a disk."""

import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

# Without credentials, query or fragment; `anonymous@` asks for access without credentials.
_BUCKET = re.compile(r"(anonymous@)?[A-Za-z0-9][A-Za-z0-9._-]*")
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class UnsafeNameError(OSError):
    """A name that would lead out of the folder it is used in.

    An OSError, so that whoever handles a bucket that cannot be read handles this, too.
    """


def is_plain(name: str) -> bool:
    """Whether a relative name stays below its folder: no empty part, `.`, `..` or control code."""
    return not _CONTROL.search(name) and not {"", ".", ".."}.intersection(name.split("/"))


def refuse_unsafe_name(name: str, where: object) -> None:
    """Refuse a relative name that is not plain.

    Args:
        name: of a file or folder.
        where: the folder, for the message.

    Raises:
        UnsafeNameError: naming both.
    """
    if not is_plain(name):
        raise UnsafeNameError(
            f"{where}: {name!r} is not used as a name in it: it has an empty part, `.`, `..` or a "
            "control character"
        )


def refuse_unsafe_url(url: str) -> None:
    """Refuse a URL of a bucket whose path is not plain; one slash at its end is none.

    Raises:
        UnsafeNameError: naming it.
    """
    protocol, _, rest = url.partition("://")
    bucket, _, _ = rest.partition("/")
    if not _PROTOCOL.fullmatch(protocol):
        raise UnsafeNameError(f"{url!r} is no URL: give s3:// or gs://")
    if not _BUCKET.fullmatch(bucket):
        raise UnsafeNameError(
            f"{url!r} names no bucket: give {protocol}://bucket/folder, without credentials"
        )
    if not is_plain(rest.removesuffix("/")):
        raise UnsafeNameError(
            f"{url!r} has an empty part, `.`, `..` or a control character: write its path without"
        )


def refuse_unsafe_file_url(url: str) -> None:
    """Refuse a URL of data, on any file system, whose path is not plain; globs are.

    Of HTTP, `%2e%2e` is `..` as well. Of URLs in one another (`zip://*.jsonl::https://...`) each
    is looked at.

    Raises:
        UnsafeNameError: naming it.
    """
    for link in url.split("::"):
        protocol, separator, rest = link.partition("://")
        if not separator:
            continue
        if protocol in ("http", "https"):
            rest = unquote(re.split("[?#]", rest, maxsplit=1)[0])
        if not is_plain(rest.removeprefix("/").removesuffix("/")):
            raise UnsafeNameError(
                f"{url!r} has an empty part, `.`, `..` or a control character: write its path "
                "without"
            )


def is_gguf(name: str) -> bool:
    """Whether a model is a GGUF file, by its name."""
    return name.lower().endswith(".gguf")


def origin_of(name: str) -> dict[str, str]:
    """The arguments of `from_pretrained` that name a folder, hub id or GGUF file.

    Raises:
        ValueError: for a GGUF file without the package that reads it.
    """
    if not is_gguf(name):
        return {"pretrained_model_name_or_path": name}
    if find_spec("gguf") is None:
        raise ValueError(
            f"{name}: a GGUF file needs the package gguf: pip install 'orpo_ray[gguf]'"
        )
    file = Path(name).expanduser()
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}

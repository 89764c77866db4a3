"""Hiding secrets in whatever is printed, written or raised, by their names or their values."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

HIDDEN = "[hidden]"
# Whole names, with `_` between words; a plural like special_tokens is something else.
_NAME = re.compile(
    r"(^|_)(token|secrets?|pass|pwd|passw(or)?d|passphrase|credentials?|bearer|signature|sig|sas"
    r"|pat|dsn|conn(ection)?_?str(ing)?|webhook(_url)?"
    r"|(api|access|private|secret|auth|account|signing|shared|storage)_?key(_id)?"
    r"|[a-z0-9]+_key(_id)?)(_value)?$"
    r"|password|secret_"
)
# Tokens of the vocabulary, which users of other trainers set.
_VOCABULARY = re.compile(r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|special|stop|end|start)_token$")
# What the rules of detect-secrets do not know.
_VALUES = (
    re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}"),
    re.compile(r"(?<![A-Za-z0-9])sk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    re.compile(r"(?<![A-Za-z0-9])(?:gh[a-z]|github_pat)_[A-Za-z0-9_]{30,}"),
    re.compile(r"(?<=://)[^\s/:@?#]*:[^\s/@]+(?=@)"),
    re.compile(r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}"),
    re.compile(r"(?<![A-Za-z0-9])eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?"),
    re.compile(r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}"),
)
_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^\"']*")
# Rules that take ordinary texts for secrets, or of which there is a better one here.
_UNUSED_RULES = {"ArtifactoryDetector", "BasicAuthDetector", "IPPublicDetector"}
_UNUSED_RULES |= {"PrivateKeyDetector"}
# As in a query or a connection string: `AccountKey=...;`, `?sig=...&`.
_ASSIGNMENT = re.compile(r"(?<![\w.-])([A-Za-z][\w.-]*)=([^\s\"'&;,<>{}\[\]()]{16,})")
_QUERY = re.compile(r"(?<=://)([^\s?\"'<>]+)\?[^\s\"'<>]*=[^\s\"'<>:]*")
# C0, DEL and C1, and marks that turn the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_PIECE, _GAP = 4096, re.compile(r"[\s\"'<>]")
_MIN_LENGTH = 10  # of a variable's value: shorter ones occur in ordinary text


def is_secret_name(name: str) -> bool:
    """Whether a key or a variable is named like a secret: `api_key`, `hfToken`, `DB_PASSWORD`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    words = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    return bool(_NAME.search(words)) and not _VOCABULARY.search(words)


def hide(text: str) -> str:
    """Replace secrets in a text that someone or something may read.

    Those are known patterns, values of secret environment variables, and queries of URLs.
    """
    hidden = (_QUERY.sub(rf"\1?{HIDDEN}", piece) for piece in _pieces(without_secrets(text)))
    return "".join(hidden)


def printable(text: str) -> str:
    """A text with its control characters, but for line ends and tabs, as escapes.

    On a terminal they would move the cursor, rename the window, or hide what was printed before.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_secrets(text: str) -> str:
    """As `hide`, but with queries of URLs that hold no secret."""
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    return "".join(map(_without_patterns, _pieces(_KEY.sub(HIDDEN, text))))


def _pieces(text: str) -> Iterator[str]:
    """Parts of a text in order, each ending between two words if it can.

    The time of some patterns grows with the square of the text, which may be anybody's.
    """
    start = 0
    while len(text) - start > _PIECE:
        gaps = [found.end() for found in _GAP.finditer(text, start, start + _PIECE)]
        end = gaps[-1] if gaps else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _without_patterns(text: str) -> str:
    for pattern in _VALUES:
        text = pattern.sub(HIDDEN, text)
    for rule in _rules():
        for pattern in rule.denylist:
            # All that it matches: what the rule itself gives may be a part, as `glpat` of a token.
            text = pattern.sub(
                lambda found, rule=rule: HIDDEN if any(rule.analyze_string(found[0])) else found[0],
                text,
            )
    return _ASSIGNMENT.sub(
        lambda found: f"{found[1]}={HIDDEN}" if is_secret_name(found[1]) else found[0], text
    )


@functools.cache
def _rules() -> Sequence[Any]:
    """The rules of detect-secrets for tokens of known services; none of them asks a network."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    rules: Sequence[Any] = [*get_mapping_from_secret_type_to_class().values()]
    return [
        rule()
        for rule in rules
        if issubclass(rule, RegexBasedDetector) and rule.__name__ not in _UNUSED_RULES
    ]


def _secrets_of_environment() -> list[str]:
    """Values of all environment variables named like secrets, the longest first.

    A path, as in GOOGLE_APPLICATION_CREDENTIALS, is not itself a secret.
    """
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _MIN_LENGTH and is_secret_name(name) and not os.path.exists(value)
    }
    return sorted(values, key=len, reverse=True)

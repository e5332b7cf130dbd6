"""Secrets leave texts before they are kept: passwords in URLs, tokens, and the secrets of this process's environment.

Texts are documents, logs and environments. Streams of our own records (``.jsonl``), checkpoints and exports are left as
they are: they hold no addresses, and their readers check every byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping

from disagg_core.storage.trees import Filter

HIDDEN = "***"
_TEXTS = (".json", ".log", ".txt", ".md", ".html", ".yaml", ".yml", ".err", ".out")
_LEFT_ALONE = ("checkpoints/", "export/")
_PICTURE = b'<img src="data:'
"""How the line of a page begins that holds a picture: in base64 anything occurs by chance."""
_LONGEST_LINE = 1024**2
_SHORTEST_SECRET = 8
"""Characters of a value in the environment that is looked for: shorter ones occur by chance."""
_SECRET_NAME = re.compile(
    r"(^|_)(PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIALS?|AUTHORIZATION)($|_)|(API|ACCESS|ACCOUNT|PRIVATE|SIGNING)_?KEY",
    re.I,
)
_PATTERNS = (
    re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]*://[^\s/:@\"']*:)[^\s/@\"']+(?=@)", re.I),
    re.compile(r"(?P<keep>\bbearer\s+)[\w.~+/=-]{8,}", re.I),
    re.compile(
        r"(?P<keep>(?:password|passwd|secret(?:_?(?:access)?_?key)?|api[_-]?key|access[_-]?key(?:[_-]?id)?|"
        r"(?:access|auth|refresh|session|security|hf|api|hub)[_-]?token|account[_-]?key|x-amz-signature)"
        r"[\"']?\s*[=:]\s*[\"']?)(?!\*{3}|null\b|None\b|true\b|false\b)[^\s\"',;&}]+",
        re.I,
    ),
    re.compile(r"\b(?P<keep>hf_|ghp_|gho_|github_pat_|sk-|xox[abp]-|AKIA|ASIA)[A-Za-z0-9_-]{16,}"),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return `text` with `HIDDEN` in place of what looks like a secret, and of each of `secrets`."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: match["keep"] + HIDDEN, text)
    return text


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return the values of the variables whose names say that they are secret, the longest first."""
    found = {
        value for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    }
    return sorted(found, key=len, reverse=True)


def redacted_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with the values of secret variables hidden, and secrets in other values too."""
    secrets = secrets_of(environment)
    return {
        name: HIDDEN if _SECRET_NAME.search(name) else redact(value, secrets)
        for name, value in sorted(environment.items())
    }


def redaction_of(name: str) -> Filter | None:
    """Return what takes the secrets out of the file called `name`; None for files that are no texts."""
    if not name.endswith(_TEXTS) or name.startswith(_LEFT_ALONE):
        return None
    secrets = secrets_of(os.environ)

    def lines_redacted(blocks: Iterable[bytes]) -> Iterator[bytes]:
        for line in _lines(blocks):
            if line.startswith(_PICTURE):
                yield line
                continue
            yield redact(line.decode(errors="surrogateescape"), secrets).encode(errors="surrogateescape")

    return lines_redacted


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield whole lines of a file, and pieces of lines that are too long to be held."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).splitlines(keepends=True) or [b""]
        yield from lines
        if rest.endswith(b"\n") or len(rest) > _LONGEST_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest

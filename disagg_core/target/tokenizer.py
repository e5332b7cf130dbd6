"""The tokenizer of a target and the chat template in force: loaded, and told apart by a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from disagg_core.errors import PromptError, TargetError
from disagg_core.run_spec.document import DataSection, TargetSection
from disagg_core.run_spec.section import is_local


def template_text(tokenizer: Any, override: str | None) -> str | None:
    """Return the Jinja source of the chat template in force, or None if there is none.

    Raises:
        PromptError: `override` names a file that cannot be read, or the tokenizer has several templates without a
            default.
    """
    if override is not None:
        path = Path(override).expanduser()
        if not path.is_file():
            raise PromptError(f"data.chat_template: no such file: {path}; give a file with a Jinja chat template")
        return path.read_text(encoding="utf-8")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise PromptError(
                f"the tokenizer has chat templates named {', '.join(sorted(template))} and no default; "
                "write the one to use into a file and name it in data.chat_template"
            )
        return str(template["default"])
    return None if template is None else str(template)


def tokenizer_version(tokenizer: Any, template: str | None, kwargs: Mapping[str, Any] | None = None) -> str:
    """Return the fingerprint of a tokenizer and the chat template in force (16 hex digits).

    Covers the vocabulary, the added and special tokens, the way text is split (a fast tokenizer's own document), the
    template's source and what the run document gives it (`kwargs`).
    """
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        document = msgspec.json.decode(tokenizer.backend_tokenizer.to_str())
        document.pop("truncation", None)  # set by calls, not by the tokenizer's author
        document.pop("padding", None)
        digest.update(msgspec.json.encode(document, order="sorted"))
    else:
        digest.update(msgspec.json.encode(tokenizer.get_vocab(), order="sorted"))
    digest.update(msgspec.json.encode(tokenizer.special_tokens_map, order="sorted", enc_hook=str))
    digest.update((template or "").encode())
    if kwargs:
        digest.update(msgspec.json.encode(kwargs, order="sorted"))
    return digest.hexdigest()[:16]


def version_in_use(tokenizer: Any, data: DataSection) -> str:
    """Return the fingerprint of a tokenizer with the chat template, and what it is given, of a run document.

    Raises:
        PromptError: as for `template_text`.
    """
    return tokenizer_version(tokenizer, template_text(tokenizer, data.chat_template), data.chat_template_kwargs)


def load_tokenizer(section: TargetSection) -> Any:
    """Load the tokenizer of a target.

    Raises:
        TargetError: it has none, or none that can be read.
    """
    from transformers import AutoTokenizer

    source = str(Path(section.model).expanduser()) if is_local(section.model) else section.model
    if is_local(section.model) and not Path(source).is_dir():
        raise TargetError(f"target.model: no such directory: {source}; give a directory with a tokenizer or a hub id")
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise TargetError(
            f"target.model: cannot load a tokenizer from {section.model!r}: {str(error).splitlines()[0]}"
        ) from error

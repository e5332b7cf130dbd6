"""The chat template of a target: from messages to the text that the target sees.

The template is the tokenizer's own or a given Jinja file. It is rendered by transformers' own sandboxed engine, so
that the text is what a serving engine makes of the same messages.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from disagg_core.errors import PromptError, PromptRejected, TargetError
from disagg_core.prompts.records import Message
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = threading.Lock()  # transformers caches one compiled template for all threads and tracks spans inside it

Span = tuple[int, int]


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


def tokenizer_version(tokenizer: Any, template: str | None) -> str:
    """Return the fingerprint of a tokenizer and the chat template in force (16 hex digits).

    Covers the vocabulary, the added and special tokens, the way text is split (a fast tokenizer's own document) and
    the template's source.
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
    return digest.hexdigest()[:16]


def load_tokenizer(section: TargetSection) -> Any:
    """Load the tokenizer of a target.

    Raises:
        TargetError: it has none, or none that can be read.
    """
    from transformers import AutoTokenizer

    source = str(Path(section.model).expanduser()) if is_local(section.model) else section.model
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise TargetError(
            f"target.model: cannot load a tokenizer from {section.model!r}: {str(error).splitlines()[0]}"
        ) from error


class ChatTemplate:
    """Renders messages. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.source = source
        self.marks_generation = _GENERATION.search(source) is not None
        """Whether the template says by ``{% generation %}`` blocks what the assistant wrote."""
        self._specials: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generation_prompt: bool = False
    ) -> str:
        """Return the text of `messages`, with the opening of an assistant turn at the end if asked for.

        Raises:
            PromptRejected: the template refuses these messages; its own words are in the message.
        """
        return self._render(messages, tools, generation_prompt, marks=False)[0]

    def render_marked(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> tuple[str, list[Span]]:
        """Return the text of `messages` and the character spans of the template's generation blocks, in order.

        Raises:
            PromptRejected: as for `render`.
        """
        return self._render(messages, tools, False, marks=True)

    def _render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, generation_prompt: bool, *, marks: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _RENDERING:
                texts, spans = render_jinja_template(
                    conversations=[list(messages)],
                    tools=tools,
                    chat_template=self.source,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=generation_prompt,
                    **self._specials,
                )
        except (jinja2.TemplateError, TypeError) as error:
            raise PromptRejected(f"the chat template refuses the conversation: {error}") from error
        return texts[0], [(start, stop) for start, stop in spans[0]] if marks else []

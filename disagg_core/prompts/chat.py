"""The chat template of a target: from messages to the text that the target sees.

The template is the tokenizer's own or a given Jinja file. It is rendered by transformers' own sandboxed engine, so
that the text is what a serving engine makes of the same messages.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import jinja2

from disagg_core.errors import PromptRejected
from disagg_core.prompts.shapes import Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = threading.Lock()  # transformers caches one compiled template for all threads and tracks spans inside it

Span = tuple[int, int]


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

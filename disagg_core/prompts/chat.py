"""The chat template of a target: from messages to the text that the target sees.

The template is the tokenizer's own or a given Jinja file. It is rendered by transformers' own sandboxed engine, so
that the text is what a serving engine makes of the same messages. Messages are first put the way the template wants
them: what it calls a thought, whether it writes arguments of calls from objects or from text, whether it knows
developers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import msgspec

from disagg_core.errors import PromptError, PromptRejected
from disagg_core.prompts.shapes import Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = threading.Lock()  # transformers caches one compiled template for all threads and tracks spans inside it
_THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking")
_OPENING, _CLOSING = "<think>", "</think>"

Span = tuple[int, int]

_REFUSALS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What a template raises where messages are not what it expects."""


class ChatTemplate:
    """Renders messages. Safe to use from several threads.

    `kwargs` is what the run document gives the template (``data.chat_template_kwargs``), `eos_token_ids` are the
    tokens at which the target stops, where more is known of them than the tokenizer says.

    Raises:
        PromptError: the template does not read one of `kwargs`.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str,
        kwargs: Mapping[str, Any] | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.source = source
        self.marks_generation = _GENERATION.search(source) is not None
        """Whether the template says by ``{% generation %}`` blocks what the assistant wrote."""
        self._variables: dict[str, Any] = {**tokenizer.special_tokens_map, **(kwargs or {})}
        for name in kwargs or ():
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise PromptError(
                    f"data.chat_template_kwargs: expected variables that the chat template reads, found {name!r}, "
                    "which stands nowhere in it"
                )
        stops = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(eos_token_ids))]
        self.stops = frozenset(str(token) for token in stops if token)
        """Tokens that end the target's answer, as text."""
        self._thought_names = [name for name in _THOUGHT_NAMES if re.search(rf"\b{name}\b", source)]
        self._splits_content = _CLOSING in source
        self._knows_developers = "developer" in source
        self._arguments_as_text = False

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        *,
        generation_prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of `messages`, with the opening of an assistant turn at the end if asked for.

        `kwargs` is what a record gives the template itself, beside and before what the run document gives.

        Raises:
            PromptRejected: the template refuses these messages; its own words are in the message.
        """
        return self._render(messages, tools, generation_prompt, kwargs, marks=False)[0]

    def render_marked(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        *,
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Return the text of `messages` and the character spans of the template's generation blocks, in order.

        Raises:
            PromptRejected: as for `render`.
        """
        return self._render(messages, tools, False, kwargs, marks=True)

    @cached_property
    def header(self) -> str:
        """The text that opens an assistant turn; empty where the template has none or shows it in no simple way."""
        asked = [{"role": "user", "content": "?"}]
        try:
            closed, opened = (self.render(asked, None, generation_prompt=wanted) for wanted in (False, True))
        except PromptRejected:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    def _render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        generation_prompt: bool,
        kwargs: Mapping[str, Any] | None,
        *,
        marks: bool,
    ) -> tuple[str, list[Span]]:
        given = {**self._variables, **(kwargs or {}), "add_generation_prompt": generation_prompt}
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        if not calls or self._arguments_as_text:
            return self._rendered(messages, tools, given, marks)
        try:
            found = self._rendered(messages, tools, given, marks)
        except PromptRejected:
            as_text = self._rendered(messages, tools, given, marks, arguments_as_text=True)
            self._arguments_as_text = True
            return as_text
        if any(arguments and repr(arguments) in found[0] for arguments in map(_arguments, calls)):
            self._arguments_as_text = True  # it writes them as they are, and Python's quotes are no JSON
            return self._rendered(messages, tools, given, marks)
        return found

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        given: Mapping[str, Any],
        marks: bool,
        arguments_as_text: bool = False,
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        as_text = arguments_as_text or self._arguments_as_text
        try:
            with _RENDERING:
                texts, spans = render_jinja_template(
                    conversations=[[self._fitted(message, as_text) for message in messages]],
                    tools=tools,
                    chat_template=self.source,
                    return_assistant_tokens_mask=marks,
                    **given,
                )
        except _REFUSALS as error:
            reason = str(error) or type(error).__name__
            raise PromptRejected(f"the chat template refuses the conversation: {reason}") from error
        return texts[0], [(start, stop) for start, stop in spans[0]] if marks else []

    def _fitted(self, message: Message, arguments_as_text: bool) -> Message:
        """Return `message` the way the template wants it."""
        if message["role"] == "developer" and not self._knows_developers:
            message = {**message, "role": "system"}
        if message["role"] == "assistant":
            message = self._with_thought(message)
        if arguments_as_text and message.get("tool_calls"):
            message = {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        return message

    def _with_thought(self, message: Message) -> Message:
        """Return `message` with its thought where the template looks for it; one that it never shows is left out.

        A raw completion may begin inside of the thought that the header had opened.
        """
        thought, content = message.get("reasoning_content"), message["content"]
        before, closing, after = content.partition(_CLOSING)
        if closing and _OPENING not in before and not thought:
            if not self._thought_names:
                return {**message, "content": f"{_OPENING}\n{content}"}
            thought, content = before.strip("\n"), after.lstrip("\n")
        if not thought:
            return message
        if self._thought_names:
            return {**message, "content": content, **dict.fromkeys(self._thought_names, thought)}
        if self._splits_content and _CLOSING not in content:
            return {**message, "content": f"{_OPENING}\n{thought}\n{_CLOSING}\n\n{content}"}
        return message


def _arguments(call: Message) -> object:
    return call["function"].get("arguments")


def _with_text(call: Message) -> Message:
    arguments = msgspec.json.encode(_arguments(call)).decode()
    return {**call, "function": {**call["function"], "arguments": arguments}}

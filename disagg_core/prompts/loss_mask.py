"""Which tokens of a conversation are trained on: the assistant's words, as exact character spans of the rendered text.

A span begins where the assistant begins to generate (after the turn's header) and ends with the token that ends its
turn: what a serving engine would see the target emit. Three ways to find it, the first that applies:

1. the template's ``{% generation %}`` blocks;
2. by prefix: the text of the messages before the turn, with the opening of an assistant turn, and the text of the
   messages up to the turn are prefixes of the whole text; between them lies the turn;
3. by a stand-in: where earlier turns are rendered differently once others follow (a thinking template drops old
   thoughts, some templates move the tools), the turn's content is replaced by a marker, and what surrounds the
   marker is found again around the turn.

A template that allows none of them is refused by name; guessing would train on the user's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disagg_core.errors import PromptRejected
from disagg_core.prompts.chat import ChatTemplate, Span
from disagg_core.prompts.shapes import Conversation, Message

_MARKER = "\u2402stand-in\u2403"
_THOUGHT_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
_OPEN_THOUGHT = re.compile(r"<think(?:ing)?>\s*(?:</think(?:ing)?>\s*)?$|\[THINK\]\s*$")


@dataclass(frozen=True)
class MaskRules:
    """What of the assistant's words is trained on; see `disagg_core.run_spec.document.DataSection`."""

    last_only: bool = False
    thinking: bool = True
    tool_calls: bool = True


class UnmaskableTemplate(PromptRejected):
    """No way was found to tell the assistant's words from the others in this template's text."""


def conversation_spans(
    chat: ChatTemplate, conversation: Conversation, rules: MaskRules, end_tokens: Sequence[str]
) -> tuple[str, list[Span]]:
    """Return the rendered text of `conversation` and the character spans in it that may be trained on.

    `end_tokens` are the added tokens of the tokenizer: one of them ends a turn.

    Raises:
        UnmaskableTemplate: none of the three ways works for a turn.
        PromptRejected: the template refuses the conversation.
    """
    messages = conversation.messages
    wanted = _wanted_turns(conversation, rules)
    if not wanted:
        return chat.render(messages, conversation.tools), []
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if chat.marks_generation:
        text, blocks = chat.render_marked(messages, conversation.tools)
        spans = _blocks_of_turns(blocks, turns, wanted)
    else:
        text, spans = chat.render(messages, conversation.tools), None
    if spans is None:
        finder = _TurnFinder(chat, conversation, text, tuple(end_tokens))
        spans = [finder.span(position) for position in wanted]
    if not rules.thinking:
        spans = [part for span in spans for part in without_thoughts(text, span)]
    return text, [span for span in spans if span[0] < span[1]]


def _wanted_turns(conversation: Conversation, rules: MaskRules) -> list[int]:
    turns = [position for position, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if rules.last_only:
        turns = turns[-1:]
    return [p for p in turns if rules.tool_calls or p not in conversation.tool_call_turns]


def _blocks_of_turns(blocks: list[Span], turns: list[int], wanted: list[int]) -> list[Span] | None:
    """Return the generation blocks of the wanted turns, or None if blocks and turns cannot be matched."""
    if wanted == turns:
        return blocks if blocks else None
    if len(blocks) != len(turns):
        return None
    return [block for block, position in zip(blocks, turns, strict=True) if position in wanted]


def without_thoughts(text: str, span: Span) -> list[Span]:
    """Return the parts of `span` that are not a thought.

    A thought runs from its opening tag, or from the span's start where the header has opened it, to the closing tag
    and the white space after it.
    """
    start, stop = span
    parts: list[Span] = []
    for opening, closing in _THOUGHT_TAGS:
        while (end := text.find(closing, start, stop)) >= 0:
            begin = text.find(opening, start, end)
            if begin > start:
                parts.append((start, begin))
            start = end + len(closing)
            while start < stop and text[start].isspace():
                start += 1
    parts.append((start, stop))
    return parts


class _TurnFinder:
    """Finds assistant turns of one conversation in its rendered text, without generation blocks."""

    def __init__(self, chat: ChatTemplate, conversation: Conversation, text: str, end_tokens: tuple[str, ...]) -> None:
        self._chat = chat
        self._messages = conversation.messages
        self._tools = conversation.tools
        self._text = text
        self._end_tokens = end_tokens

    def span(self, position: int) -> Span:
        """Return the characters of the assistant message at `position`, the token that ends its turn included."""
        start, stop = self._start_by_prefix(position), self._stop_by_prefix(position)
        if start is None or stop is None:
            marked = self._around_stand_in(position)
            start = marked[0] if start is None and marked else start
            stop = marked[1] if stop is None and marked else stop
        if start is None or stop is None or start > stop:
            raise UnmaskableTemplate(
                f"the assistant turn at message {position} cannot be found in the text of the chat template: its text "
                "changes with what follows; mark what the assistant writes with {% generation %} blocks in a template "
                "given as data.chat_template"
            )
        return start, stop

    def _start_by_prefix(self, position: int) -> int | None:
        if position == 0:
            return None
        try:
            opened = self._chat.render(self._messages[:position], self._tools, generation_prompt=True)
        except PromptRejected:
            return None
        for before in (opened, _OPEN_THOUGHT.sub("", opened)):
            if self._text.startswith(before):
                return len(before)
        return None

    def _stop_by_prefix(self, position: int) -> int | None:
        if position == len(self._messages) - 1:
            return self._end_of_turn(0, len(self._text))
        try:
            upto = self._chat.render(self._messages[: position + 1], self._tools)
        except PromptRejected:
            return None
        return self._end_of_turn(0, len(upto)) if self._text.startswith(upto) else None

    def _end_of_turn(self, start: int, stop: int) -> int:
        """Return `stop` without the white space that the template puts after the token that ends the turn."""
        bare = len(self._text[start:stop].rstrip()) + start
        return bare if self._text[start:bare].endswith(self._end_tokens) else stop

    def _around_stand_in(self, position: int) -> Span | None:
        message = self._messages[position]
        content = message.get("content")
        if not content or message.get("tool_calls"):
            return None
        replaced: list[Message] = list(self._messages)
        replaced[position] = {**message, "content": _MARKER}
        try:
            before, found, after = self._chat.render(replaced, self._tools).partition(_MARKER)
        except PromptRejected:
            return None
        if not (found and self._text.startswith(before) and self._text.endswith(after)):
            return None
        stop = len(self._text) - len(after)
        return len(before), stop + self._closing_token(after)

    def _closing_token(self, after: str) -> int:
        """Return the length of the token that ends the turn, with white space before it, at the start of `after`."""
        bare = after.lstrip()
        for token in sorted(self._end_tokens, key=len, reverse=True):
            if bare.startswith(token):
                return len(after) - len(bare) + len(token)
        return 0


def mask_of_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return 1 for each token whose first character lies in one of `spans` (ascending, disjoint), 0 for the others.

    `offsets` are the character spans of the tokens, ascending. A token that begins before a span and reaches into it
    stays 0: the target never had to predict it as the assistant. Tokens without characters are 0.
    """
    mask = [0] * len(offsets)
    position = 0
    for token, (first, last) in enumerate(offsets):
        while position < len(spans) and spans[position][1] <= first:
            position += 1
        if position < len(spans) and first < last and spans[position][0] <= first:
            mask[token] = 1
    return mask


def end_tokens_of(tokenizer: Any) -> list[str]:
    """Return the added tokens of a tokenizer, as text: those that may end a turn."""
    return [str(token) for token in tokenizer.get_added_vocab()]

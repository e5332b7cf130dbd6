"""Which tokens of a conversation are trained on: the assistant's words, as exact character spans of the rendered text.

A span begins where the assistant begins to generate (after the turn's header) and ends with the token that ends its
turn: what a serving engine would see the target emit. That token is trained on however the span was found, also where
the template writes it behind a generation block, or where it is the first of the next turn's header (GLM stops at the
user's). Three ways to find a span, the first that applies:

1. the template's ``{% generation %}`` blocks;
2. by prefix: the text of the messages before the turn, with the opening of an assistant turn, and the text of the
   messages up to the turn are prefixes of the whole text; between them lies the turn;
3. by a stand-in: where earlier turns are rendered differently once others follow (a thinking template drops old
   thoughts, some templates move the tools), the turn's content is replaced by a marker, and what surrounds the
   marker is found again around the turn. The end of a turn that has calls is found before the content that follows it.

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
_THOUGHT_TAGS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
)  # fmt: skip
_CHANNEL = ("<|channel|>analysis<|message|>", "<|end|>")
"""A thought whose closing token ends other things, too."""
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
    tools, kwargs = conversation.tools, conversation.template_kwargs
    wanted = _wanted_turns(conversation, rules)
    if not wanted:
        return chat.render(messages, tools, kwargs=kwargs), []
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    ends = TurnEnds(chat, end_tokens)
    spans: list[Span] | None = None
    if chat.marks_generation:
        text, blocks = chat.render_marked(messages, tools, kwargs=kwargs)
        blocks = [(start, ends.after_block(text, start, stop)) for start, stop in blocks]
        spans = _blocks_of_turns(blocks, turns, wanted)
    else:
        text = chat.render(messages, tools, kwargs=kwargs)
    if spans is None:
        finder = _TurnFinder(chat, conversation, text, ends)
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
    for opening, closing in (*_THOUGHT_TAGS, _CHANNEL):
        while (end := text.find(closing, start, stop)) >= 0:
            begin = text.find(opening, start, end)
            if begin < 0 and closing == _CHANNEL[1]:
                break
            if begin > start:
                parts.append((start, begin))
            start = end + len(closing)
            while start < stop and text[start].isspace():
                start += 1
    parts.append((start, stop))
    return parts


class TurnEnds:
    """Tells where a turn ends from the tokens around: the target's own stops, and any added token of no header."""

    def __init__(self, chat: ChatTemplate, added: Sequence[str]) -> None:
        self._stops = tuple(chat.stops)
        self._added = tuple(sorted({*added, *chat.stops}, key=len, reverse=True))
        self._openings = {token for token in self._added if token in chat.header}

    def at(self, text: str, stop: int) -> int:
        """Return `stop` without the white space that the template puts after the token that ends the turn.

        Where no token ends it, and the next one is a stop of the target, the turn ends with that.
        """
        bare = len(text[:stop].rstrip())
        if text.endswith(self._stops, 0, bare):
            return bare
        if token := self._token_at(text, stop, self._stops):
            return stop + len(token)
        return bare if text.endswith(self._added, 0, bare) else stop

    def after_block(self, text: str, start: int, stop: int) -> int:
        """Return the end of the turn whose generation block is ``text[start:stop]``."""
        if text.endswith(self._stops, start, len(text[:stop].rstrip())):
            return stop
        token = self._token_at(text, stop, self._added)
        if token and token not in self._openings:
            return stop + len(token)
        return self._behind_space(text, stop, self._stops)

    def after_content(self, text: str, stop: int) -> int:
        """Return the end of the turn whose content ends at `stop`."""
        return self._behind_space(text, stop, [token for token in self._added if token not in self._openings])

    def last_before(self, text: str, start: int, stop: int, like: str) -> int | None:
        """Return the end of the last token in ``text[start:stop]`` that also ends the text `like`."""
        bare = like.rstrip()
        token = next((token for token in self._added if bare.endswith(token)), None)
        found = -1 if token is None else text.rfind(token, start, stop)
        return None if token is None or found < 0 else found + len(token)

    def _behind_space(self, text: str, stop: int, tokens: Sequence[str]) -> int:
        first = len(text) - len(text[stop:].lstrip())
        token = self._token_at(text, first, tokens)
        return first + len(token) if token else stop

    @staticmethod
    def _token_at(text: str, place: int, tokens: Sequence[str]) -> str:
        return next((token for token in tokens if text.startswith(token, place)), "")


class _TurnFinder:
    """Finds assistant turns of one conversation in its rendered text, without generation blocks."""

    def __init__(self, chat: ChatTemplate, conversation: Conversation, text: str, ends: TurnEnds) -> None:
        self._chat = chat
        self._messages = conversation.messages
        self._tools = conversation.tools
        self._kwargs = conversation.template_kwargs
        self._text = text
        self._ends = ends

    def span(self, position: int) -> Span:
        """Return the characters of the assistant message at `position`, the token that ends its turn included."""
        start, stop = self._start_by_prefix(position), self._stop_by_prefix(position)
        if start is None or stop is None:
            marked = self._around_stand_in(position)
            start = marked[0] if start is None and marked else start
            stop = marked[1] if stop is None and marked else stop
        if start is not None and stop is None:
            stop = self._stop_by_next(position, start)
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
            opened = self._render(self._messages[:position], generation_prompt=True)
        except PromptRejected:
            return None
        for before in (opened, _OPEN_THOUGHT.sub("", opened), opened.rstrip()):
            if self._text.startswith(before):
                return len(before)
        return None

    def _stop_by_prefix(self, position: int) -> int | None:
        if position == len(self._messages) - 1:
            return self._ends.at(self._text, len(self._text))
        try:
            upto = self._render(self._messages[: position + 1])
        except PromptRejected:
            return None
        return self._ends.at(self._text, len(upto)) if self._text.startswith(upto) else None

    def _stop_by_next(self, position: int, start: int) -> int | None:
        """Return the end of a turn as the last of its kind before the content of the next message."""
        following = self._messages[position + 1 : position + 2]
        if not following or not following[0]["content"]:
            return None
        replaced = [*self._messages[: position + 1], {**following[0], "content": _MARKER}]
        try:
            upto = self._render(self._messages[: position + 1])
            before, found, _ = self._render([*replaced, *self._messages[position + 2 :]]).partition(_MARKER)
        except PromptRejected:
            return None
        if not (found and self._text.startswith(before)):
            return None
        return self._ends.last_before(self._text, start, len(before), upto)

    def _around_stand_in(self, position: int) -> Span | None:
        message = self._messages[position]
        content = message.get("content")
        if not content or message.get("tool_calls"):
            return None
        replaced: list[Message] = list(self._messages)
        thought = content.rfind("</think>") + len("</think>") if "</think>" in content else 0
        replaced[position] = {**message, "content": content[:thought] + _MARKER}
        try:
            before, found, after = self._render(replaced).partition(_MARKER)
        except PromptRejected:
            return None
        if not (found and self._text.startswith(before) and self._text.endswith(after)):
            return None
        return len(before), self._ends.after_content(self._text, len(self._text) - len(after))

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        return self._chat.render(messages, self._tools, generation_prompt=generation_prompt, kwargs=self._kwargs)


def mask_of_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return 1 for each token whose first character lies in one of `spans` (ascending, disjoint), 0 for the others.

    `offsets` are the character spans of the tokens, ascending. A token that begins before a span and reaches into it
    stays 0: the target never had to predict it as the assistant. Tokens without characters are 1 between two tokens
    of the same span.
    """
    mask = [0] * len(offsets)
    position = 0
    for token, (first, last) in enumerate(offsets):
        while position < len(spans) and spans[position][1] <= first:
            position += 1
        if position < len(spans) and first < last and spans[position][0] <= first:
            mask[token] = 1
    _fill_empty(mask, offsets, spans)
    return mask


def _fill_empty(mask: list[int], offsets: Sequence[Span], spans: Sequence[Span]) -> None:
    """Set the tokens without characters that stand between two tokens of one span."""
    live = -1  # the last token before that is trained on
    for token, (first, last) in enumerate(offsets):
        if first == last:
            continue
        if mask[token] and live >= 0 and token - live > 1:
            gap = offsets[live][0], first
            inside = any(start <= gap[0] and gap[1] < stop for start, stop in spans)
            mask[live + 1 : token] = [int(inside)] * (token - live - 1)
        live = token if mask[token] else -1


def end_tokens_of(tokenizer: Any) -> list[str]:
    """Return the added tokens of a tokenizer, as text: those that may end a turn."""
    return [str(token) for token in tokenizer.get_added_vocab()]

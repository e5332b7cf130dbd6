"""From a record to token ids and a loss mask: tokenisation, masks, truncation, and the reasons to reject a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from disagg_core.drafts.together import untrainable
from disagg_core.errors import PromptError, PromptRejected
from disagg_core.prompts.chat import ChatTemplate
from disagg_core.prompts.loss_mask import MaskRules, conversation_spans, end_tokens_of, mask_of_spans
from disagg_core.prompts.offsets import OffsetTokenizer
from disagg_core.prompts.shapes import (
    Conversation,
    PlainText,
    PromptResponse,
    Record,
    Tokenized,
    answer_start,
    context_length,
)
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import TargetFacts
from disagg_core.target.tokenizer import template_text


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids and loss mask of one prompt, of the same length."""

    input_ids: list[int]
    loss_mask: list[int]


class PromptEncoder:
    """Turns records into token ids and masks by the rules of a run's document. Safe from several threads.

    With the target's `facts` the tokens at which it stops, and how many it has, are known beside the tokenizer's.

    Raises:
        PromptError: the chat template in force cannot be read, or does not read one of ``data.chat_template_kwargs``.
    """

    def __init__(self, spec: RunSpec, tokenizer: Any, facts: TargetFacts | None = None) -> None:
        self._data = data = spec.data
        self._drafts = spec.all_drafts
        self.tokenizer = tokenizer
        self._end_tokens = end_tokens_of(tokenizer)
        self._target_vocab = None if facts is None else facts.vocab_size
        source = template_text(tokenizer, data.chat_template)
        stops = facts.eos_token_ids if facts is not None else ()
        self.chat = ChatTemplate(tokenizer, source, data.chat_template_kwargs, stops) if source else None
        if self.chat is None and data.chat_template_kwargs:
            raise PromptError("data.chat_template_kwargs: expected a chat template, found none; leave them out")
        self._offsets = OffsetTokenizer(tokenizer)
        self._rules = MaskRules(
            last_only=data.loss_on == "last_assistant",
            thinking=data.train_on_thinking,
            tool_calls=data.train_on_tool_calls,
        )

    def encode(self, record: Record) -> EncodedPrompt:
        """Return what a capture of `record` starts from.

        With `data.generate` that is the prompt which the target continues (mask 0 everywhere); otherwise the whole
        sample with its mask.

        Raises:
            PromptRejected: too long, nothing in it to train on, or a token that the target does not have.
            PromptError: conversations, and the tokenizer has no chat template.
        """
        if self._data.generate is not None:
            return self._room_to_continue(self.encode_prompt(record))
        encoded = self._whole(record)
        self._check_ids(encoded.input_ids)
        if len(encoded.input_ids) > self._data.max_tokens:
            encoded = self._truncated(encoded)
        if (reason := untrainable(self._drafts, encoded.loss_mask)) is not None:
            raise PromptRejected(reason)
        return encoded

    def encode_prompt(self, record: Record) -> list[int]:
        """Return the prompt tokens of `record`, ending where the target continues.

        Running text without an answer is its own prompt.

        Raises:
            PromptRejected: the template refuses it, or the target has no such token.
            PromptError: as for `encode`.
        """
        ids = self._prompt(record)
        self._check_ids(ids)
        return ids

    def _prompt(self, record: Record) -> list[int]:
        match record:
            case Conversation(messages, tools, _, kwargs):
                asked = messages[: context_length(messages)]
                if not asked:
                    raise PromptRejected("there is no message before the assistant's to continue from")
                return self._ids(self._template().render(asked, tools, generation_prompt=True, kwargs=kwargs))
            case PromptResponse(prompt):
                if self.chat is None:
                    return self._plain_ids(prompt)
                return self._ids(self.chat.render([_user(prompt)], None, generation_prompt=True))
            case PlainText(text):
                return self._plain_ids(text)
            case Tokenized(input_ids, loss_mask):
                return input_ids[: answer_start(loss_mask)]

    def _room_to_continue(self, prompt: list[int]) -> EncodedPrompt:
        if len(prompt) >= self._data.max_tokens:
            raise PromptRejected(
                f"the prompt has {len(prompt)} tokens, which leaves nothing of data.max_tokens "
                f"({self._data.max_tokens}) for a continuation"
            )
        if not prompt:
            raise PromptRejected("the prompt has no tokens")
        return EncodedPrompt(prompt, [0] * len(prompt))

    def _truncated(self, encoded: EncodedPrompt) -> EncodedPrompt:
        limit = self._data.max_tokens
        if self._data.truncation == "reject":
            raise PromptRejected(f"expected at most {limit} tokens (data.max_tokens), found {len(encoded.input_ids)}")
        return EncodedPrompt(encoded.input_ids[:limit], encoded.loss_mask[:limit])

    def _whole(self, record: Record) -> EncodedPrompt:
        match record:
            case Conversation():
                return self._conversation(self._template(), record)
            case PromptResponse(prompt, None):
                raise PromptRejected(f"no response to train on after the prompt {prompt[:40]!r}; set data.generate")
            case PromptResponse(prompt, str(response)):
                if self.chat is None:
                    return self._pair(prompt, response)
                answer = {"role": "assistant", "content": response}
                return self._conversation(self.chat, Conversation([_user(prompt), answer]))
            case PlainText(text):
                ids = self._plain_ids(text)
                return EncodedPrompt(ids, [1] * len(ids))
            case Tokenized(input_ids, loss_mask):
                return EncodedPrompt(input_ids, loss_mask)
        raise AssertionError(f"no such record: {record!r}")

    def _conversation(self, chat: ChatTemplate, record: Conversation) -> EncodedPrompt:
        if not self.tokenizer.is_fast:
            raise PromptError(
                "the loss mask of a conversation needs a fast tokenizer (character offsets of tokens), found "
                f"{type(self.tokenizer).__name__}; give pretokenised input_ids and loss_mask instead"
            )
        text, spans = conversation_spans(chat, record, self._rules, self._end_tokens)
        ids, offsets = self._offsets(text)
        return EncodedPrompt(ids, mask_of_spans(offsets, spans))

    def _pair(self, prompt: str, response: str) -> EncodedPrompt:
        """Return prompt and response as running text, for tokenizers without a chat template."""
        asked = self._plain_ids(prompt)
        answered = self._ids(response)
        if self.tokenizer.eos_token_id is not None:
            answered = [*answered, self.tokenizer.eos_token_id]
        return EncodedPrompt(asked + answered, [0] * len(asked) + [1] * len(answered))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _check_ids(self, ids: list[int]) -> None:
        highest, tokens = max(ids, default=0), len(self.tokenizer)
        if highest >= tokens:
            raise PromptRejected(f"token id {highest} is not of the tokenizer, which has {tokens} tokens")
        if self._target_vocab is not None and highest >= self._target_vocab:
            raise PromptRejected(f"token id {highest} is not of the target, which has {self._target_vocab} tokens")

    def _template(self) -> ChatTemplate:
        if self.chat is None:
            raise PromptError(
                "the prompts are conversations and the tokenizer has no chat template; "
                "name a Jinja file in data.chat_template"
            )
        return self.chat


def _user(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": prompt}

"""The section of the run document about its data: where the prompts are, what shape they have, what is trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from disagg_core.run_spec.section import Section

Format = Literal["messages", "sharegpt", "prompt_response", "alpaca", "turns", "text", "tokenized"]
FormatOrAuto = Literal["auto", "messages", "sharegpt", "prompt_response", "alpaca", "turns", "text", "tokenized"]
FieldName = Literal[
    "prompt", "response", "system", "messages", "conversations", "turns", "instruction", "input", "output", "text",
    "input_ids", "loss_mask", "tools", "chosen", "role", "content",
]  # fmt: skip

OF_THE_RENDERING = {
    "messages", "conversations", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "return_assistant_tokens_mask",
}  # fmt: skip


class GenerateSection(Section):
    """The target continues the prompts itself; prompt and continuation are captured."""

    max_new_tokens: int = Field(256, ge=1, description="Longest continuation, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus for sampling.")


class DataSection(Section):
    """The prompts and what of them is trained on."""

    prompts: str = Field(
        description="A file (JSONL, JSON array, CSV, TSV, Parquet; also .gz, .zst, .bz2), a directory of such files, "
        "or hf:NAME[:SPLIT] for a dataset."
    )
    format: FormatOrAuto = Field("auto", description="Format of a record; auto: by its keys.")
    fields: dict[FieldName, str] = Field(
        {}, description="Names that the data has for what a format expects, such as prompt: question."
    )
    holdout: str | None = Field(
        None, description="File of held-out prompts for evaluation; by default some are kept out of prompts."
    )
    on_bad_record: Literal["reject", "fail"] = Field(
        "reject", description="A record that cannot be used is rejected and counted, or ends the run."
    )
    max_bad_records: float = Field(
        0.2, ge=0, le=1, description="The run is refused with more records that cannot be used: a share of all."
    )
    max_tokens: int = Field(2048, ge=8, description="Longest sample, prompt and continuation together.")
    truncation: Literal["right", "reject"] = Field("right", description="What to do with longer ones.")
    chat_template: str | None = Field(None, description="Jinja file used instead of the tokenizer's own template.")
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {}, description="What else the chat template is given, such as enable_thinking: false."
    )
    loss_on: Literal["all_assistant", "last_assistant"] = Field(
        "all_assistant", description="Which assistant turns are trained on."
    )
    train_on_thinking: bool = Field(True, description="Train on the thinking part of assistant turns.")
    train_on_tool_calls: bool = Field(True, description="Train on assistant turns that are tool calls.")
    epochs: int = Field(1, ge=1, description="Passes over the prompts.")
    limit: int | None = Field(None, ge=1, description="Use only the first so many prompts of the seeded order.")
    shuffle: bool = Field(True, description="Seeded shuffle, another one in each epoch.")
    generate: GenerateSection | None = Field(None, description="Let the target continue the prompts.")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _leaves_the_rendering_alone(cls, given: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if found := sorted(OF_THE_RENDERING & set(given)):
            raise ValueError(f"expected variables of the template's own, found {', '.join(found)}: these are set here")
        return given

    @model_validator(mode="after")
    def _continuations_are_trained_on_whole(self) -> DataSection:
        answers = ("truncation", "loss_on", "train_on_thinking", "train_on_tool_calls")
        found = [name for name in answers if getattr(self, name) != type(self).model_fields[name].default]
        if self.generate is not None and found:
            raise ValueError(
                f"expected nothing about the answers of the data beside data.generate, found {', '.join(found)}: the "
                "target's continuation takes their place, is trained on as a whole and ends at data.max_tokens, and a "
                "prompt that leaves no room for it is rejected; leave them out, or data.generate"
            )
        return self

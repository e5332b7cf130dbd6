"""The sections of the run document about what comes of a run: how its draft is measured, judged, kept and shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from disagg_core.run_spec.section import RegistryName, SecretFreeUrl, Section

HELD_OUT = "held-out"
"""The suite that the run's own held-out prompts are."""
SuiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]


class ServerEvaluationSection(Section):
    """How `draftline evaluate --server` asks an SGLang server."""

    concurrency: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        (),
        description="Requests at once, such as [1, 8, 32]; all is measured at each. Default: one load, the target's.",
    )


class EvaluationSection(Section):
    """Speculative decoding with the draft, before and after training."""

    prompts: int = Field(16, ge=0, description="Held-out prompts to decode; 0 switches the evaluation off.")
    draft_tokens: int = Field(5, ge=1, le=16, description="Tokens drafted per target pass (k).")
    max_new_tokens: int = Field(64, ge=1, description="Tokens decoded per prompt.")
    suites: dict[SuiteName, str] = Field(
        {}, description="Further prompts by name, measured after training by category: files as for data.prompts."
    )
    suite_prompts: int | None = Field(None, ge=1, description="Of each suite use only so many questions a category.")
    suite_temperature: float = Field(0.0, ge=0, description="Sampling of the suites; 0 is greedy.")
    batch_size: int = Field(
        4, ge=1, description="Prompts decoded together; drafts and plain decoding take turns batch by batch."
    )
    server: ServerEvaluationSection = Field(
        default_factory=ServerEvaluationSection, description="Evaluation through an SGLang server."
    )
    min_accept_length: float | None = Field(None, ge=1, description="The run fails below this accept length.")
    at_end: bool = Field(True, description="Decode at the end of the run; off: hold out for draftline evaluate only.")

    @model_validator(mode="after")
    def _a_minimum_is_measured(self) -> EvaluationSection:
        if self.min_accept_length is not None and not self.measured:
            raise ValueError("min_accept_length takes effect with evaluation.prompts above 0 and at_end only")
        return self

    @model_validator(mode="after")
    def _suites_have_names_of_their_own(self) -> EvaluationSection:
        if taken := {HELD_OUT, "all"} & set(self.suites):
            raise ValueError(f"suites: expected other names than {HELD_OUT} and all, found {', '.join(sorted(taken))}")
        return self

    @property
    def measured(self) -> bool:
        """Whether the run itself measures its draft."""
        return self.at_end and self.prompts > 0


class HeldOutSection(Section):
    """A fixed set of held-out samples that the drafts are measured on while they are trained."""

    every_steps: int = Field(100, ge=1, description="Measure after every so many optimizer steps, and at the end.")
    prompts: int = Field(16, ge=1, description="Held-out prompts for it, besides those of the evaluation.")
    best_by: Literal["loss", "accept_length"] = Field(
        "loss", description="What says which checkpoint is the best: the loss, or the expected accept length."
    )

    @property
    def figure(self) -> str:
        """What the figure is called that says which checkpoint is the best."""
        return "loss" if self.best_by == "loss" else "simulated_accept_length"


class EarlyStopSection(Section):
    """Ends training when it gets the drafts no further; each draft's best checkpoint is exported then."""

    patience: int = Field(
        5, ge=1, description="Stop after so many measurements in a row without a better one, of every draft."
    )


class GateSection(Section):
    """When a draft may take the champion's place. Each bound is compared with an estimate and its interval.

    A bound that the whole interval keeps is kept; one that the estimate misses is missed; between the two it is
    uncertain. Gains and regressions are parts of the champion's accept length, prompt by prompt.
    """

    min_accept_length: float | None = Field(None, ge=1, description="Accept length that a draft needs.")
    min_gain: float | None = Field(0.0, description="Gain over the champion that it needs; 0.02 is 2 %.")
    max_regression: float | None = Field(
        0.05, ge=0, description="Loss against the champion that no suite may have; 0.05 is 5 %."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of the intervals.")
    suites: tuple[str, ...] = Field(
        (), description="Suites that count: held-out, and names of evaluation.suites; default: all that were measured."
    )
    approval: Literal["never", "uncertain", "always"] = Field(
        "uncertain",
        description="When a person decides: never (uncertain is rejected), in doubt, or on every promotion.",
    )


class RetentionSection(Section):
    """Which archives stay: those that are young or among the newest of their run's name, and those of kept drafts."""

    last: int = Field(10, ge=1, description="Archives of a run name that stay, however old.")
    days: float = Field(30.0, ge=0, description="Archives younger than this stay.")


class ArchiveSection(Section):
    """Where the results go."""

    url: SecretFreeUrl | None = Field(
        None, description="Directory or fsspec URL; default: archive/ under DRAFTLINE_HOME."
    )
    keep: int = Field(2, ge=1, description="Checkpoints kept in the run's directory and archived.")
    retention: RetentionSection | None = Field(
        None, description="Remove older archives at the end of a run; default: all stay. Never one of a kept draft."
    )


class RegistrySection(Section):
    """Where drafts are kept from run to run: their versions, and which of them is the champion."""

    url: SecretFreeUrl | None = Field(
        None, description="Directory or fsspec URL; default: DRAFTLINE_REGISTRY, or registry/ under DRAFTLINE_HOME."
    )
    name: RegistryName | None = Field(None, description="The target's name in the registry; default: the model's.")
    publish: bool = Field(
        False, description="Keep the draft as a version at the end of the run, and pass it through the gate."
    )


class WandbSection(Section):
    """Weights & Biases, with the key in WANDB_API_KEY, or a login, where the parent flow runs."""

    project: str = Field("draftline", min_length=1, description="Project of the runs.")
    entity: str | None = Field(None, description="User or team; default: that of the key.")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: written into tracking/ of the run's directory, for wandb sync."
    )


class MlflowSection(Section):
    """MLflow; user and password, or a token, are in MLFLOW_TRACKING_* where the parent flow runs."""

    uri: SecretFreeUrl | None = Field(None, description="Tracking server; default: MLFLOW_TRACKING_URI.")
    experiment: str = Field("draftline", min_length=1, description="Experiment of the runs.")
    registered_model: RegistryName | None = Field(
        None, description="Model of MLflow's registry that gets a version for each promotion; default: none."
    )


class TrackingSection(Section):
    """Where a run's figures are shown besides its report. A tracker that fails costs a warning, never the run."""

    tensorboard: bool = Field(True, description="Write event files into tensorboard/ of the run's directory.")
    wandb: WandbSection | None = Field(None, description="Weights & Biases; needs the extra 'wandb'.")
    mlflow: MlflowSection | None = Field(None, description="An MLflow server; needs the extra 'mlflow'.")

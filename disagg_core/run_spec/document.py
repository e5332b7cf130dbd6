"""The run document: the only place where a tunable of a run, its default and its description stand.

A plain pydantic model, so that Prefect shows it as a form and stores it with the run. What belongs to the machine
rather than to the run (directories, endpoints, secrets) is in `disagg_core.settings`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from disagg_core.run_spec.data import DataSection as DataSection
from disagg_core.run_spec.data import GenerateSection as GenerateSection
from disagg_core.run_spec.draft import DraftSection, draft_field
from disagg_core.run_spec.orchestration import Devices
from disagg_core.run_spec.orchestration import DevicesSection as DevicesSection
from disagg_core.run_spec.orchestration import OrchestrationSection as OrchestrationSection
from disagg_core.run_spec.orchestration import PoolsSection as PoolsSection
from disagg_core.run_spec.recurring import RecurringSection
from disagg_core.run_spec.results import HELD_OUT
from disagg_core.run_spec.results import ArchiveSection as ArchiveSection
from disagg_core.run_spec.results import EarlyStopSection as EarlyStopSection
from disagg_core.run_spec.results import EvaluationSection as EvaluationSection
from disagg_core.run_spec.results import GateSection as GateSection
from disagg_core.run_spec.results import HeldOutSection as HeldOutSection
from disagg_core.run_spec.results import RegistrySection as RegistrySection
from disagg_core.run_spec.results import TrackingSection as TrackingSection
from disagg_core.run_spec.section import Bytes, ChannelUrl, Layers, RunName, SecretFreeUrl, Section


class RunSection(Section):
    """Which run this is."""

    name: RunName = Field("training", description="Name of the run; lower case letters, digits, '.', '_' and '-'.")
    seed: int = Field(0, ge=0, description="Seed of the prompt order, of sampling and of the draft's weights.")
    attempts: int = Field(
        3,
        ge=1,
        le=100,
        description="Attempts in all; each goes on from the last checkpoint, and one outage uses up one.",
    )


class TargetSection(Section):
    """The frozen model whose drafts are trained."""

    model: str = Field(
        description="Hugging Face id, or a directory, by an absolute path or one relative to the document."
    )
    config: str | None = Field(
        None, description="Directory with the target's config.json, for planning where the weights are not at hand."
    )
    revision: str | None = Field(None, description="Revision of a Hugging Face model: a branch, tag or commit.")
    trust_remote_code: bool = Field(False, description="Allow the model's own Python code to run.")
    backend: Literal["transformers", "sglang"] = Field("transformers", description="What runs the target.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of the weights and of the captured hidden states; auto: as the model says."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where a transformers target runs.")
    cpu_threads: int | None = Field(None, ge=1, description="Threads of a transformers target on the CPU.")
    aux_layers: Layers | None = Field(
        None, description="Decoder layers (0-based) whose outputs a draft reads; default: as draft.method."
    )
    server_urls: tuple[SecretFreeUrl, ...] = Field(
        (), description="SGLang servers that run already; empty: start our own."
    )
    servers: int = Field(1, ge=1, description="How many SGLang servers to start when none are given.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one SGLang server that we start.")
    server_args: tuple[str, ...] = Field((), description="Further arguments for the SGLang servers that we start.")
    server_concurrency: int = Field(16, ge=1, description="Requests in flight per SGLang server.")
    request_timeout_s: float = Field(120.0, gt=0, description="A request to a server that takes longer has failed.")
    unavailable_timeout_s: float = Field(
        600.0, gt=0, description="With no usable server for this long the run fails (target_unavailable)."
    )

    @model_validator(mode="after")
    def _servers_need_sglang(self) -> TargetSection:
        ours = {"servers": self.servers != 1, "tensor_parallel": self.tensor_parallel != 1}
        ours["server_args"] = bool(self.server_args)
        found = [name for name, given in {"server_urls": bool(self.server_urls), **ours}.items() if given]
        if self.backend != "sglang" and found:
            raise ValueError(f"expected backend: sglang where servers are described, found {', '.join(found)}")
        if self.server_urls and len(found) > 1:
            raise ValueError(f"expected server_urls, or how to start servers of our own, found {', '.join(found)}")
        return self


class RolloutSection(Section):
    """The producer."""

    workers: int = Field(1, ge=1, le=64, description="Capture workers; 1 gives a reproducible order.")
    batch_tokens: int = Field(8192, ge=8, description="Padded tokens of one capture batch (transformers).")
    max_prompt_attempts: int = Field(3, ge=1, description="A prompt that fails this often is quarantined.")
    max_rejected: float = Field(
        0.05, ge=0, le=1, description="The run fails with more prompts refused or quarantined: a share of all."
    )
    ordered: bool = Field(True, description="Publish in prompt order, or as captures complete.")
    high_watermark_refs: int = Field(256, ge=1, description="Pause capture at so many samples in flight.")
    low_watermark_refs: int | None = Field(None, ge=1, description="Go on below this many; by default half of high.")
    high_watermark_bytes: Bytes | None = Field(None, description="Pause at so many bytes; default 80% of the store.")
    low_watermark_bytes: Bytes | None = Field(None, description="Go on below this many; by default half of high.")


class StoreSection(Section):
    """The Mooncake feature store."""

    mode: Literal["managed", "external"] = Field("managed", description="Start master and owner, or use running ones.")
    capacity: Bytes = Field(4 * 1024**3, description="Memory of the owner, in bytes or as 4GiB.")
    protocol: Literal["tcp", "rdma"] = Field("tcp", description="Transport of sample data.")
    master_address: str | None = Field(None, description="host:port of the running master (external).")
    metrics_address: str | None = Field(None, description="host:port of the running master's metrics (external).")
    checksum: bool = Field(True, description="CRC-32 of every sample.")
    put_timeout_s: float = Field(300.0, gt=0, description="A put into a full store waits this long.")

    @model_validator(mode="after")
    def _external_needs_addresses(self) -> StoreSection:
        if self.mode == "external" and not (self.master_address and self.metrics_address):
            raise ValueError("mode: external needs master_address and metrics_address (host:port each)")
        if self.mode == "managed" and (self.master_address or self.metrics_address):
            raise ValueError("expected no addresses with mode: managed, whose ports are free ones, found some")
        return self


class ChannelSection(Section):
    """The reference channel."""

    url: ChannelUrl | None = Field(
        None, description="redis://host:port/db or rediss://...; by default files in the run's directory."
    )
    idle_timeout_s: float = Field(600.0, gt=0, description="Without progress of the other side for this long: stalled.")


class ProfileSection(Section):
    """A window of torch.profiler on the first trainer process."""

    start: int = Field(10, ge=0, description="Optimizer steps before the window; the first ones compile and allocate.")
    steps: int = Field(3, ge=1, le=100, description="Optimizer steps in the window; each takes some MB of trace.")


class TrainingSection(Section):
    """The consumer."""

    batch_size: int = Field(1, ge=1, description="Samples in one micro-batch of one rank.")
    accumulation_steps: int = Field(1, ge=1, description="Micro-batches of one rank in an optimizer step.")
    packing: Literal["auto"] | bool = Field(
        "auto", description="Pack a micro-batch's samples in one row instead of padding them; auto: if lengths differ."
    )
    pack_tokens: int | None = Field(
        None, ge=1, description="Cut a step's samples into packed rows of at most so many tokens, not by batch_size."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for matrices inside a draft; AdamW for embeddings, heads, vectors."
    )
    optimizer_offload: bool = Field(
        False, description="Keep the optimizer's state in host memory; parts of it visit the GPU for the update."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate; Muon's updates are scaled to AdamW's.")
    warmup_ratio: float = Field(0.015, ge=0, lt=1, description="Part of the steps with linear warm-up.")
    max_grad_norm: float = Field(0.5, gt=0, description="Clip the global gradient norm to this.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    processes: int = Field(1, ge=1, description="Trainer processes (GPUs) on one node.")
    nodes: int = Field(1, ge=1, description="Trainer nodes.")
    context_parallel: int = Field(
        1, ge=1, description="Ranks that share each sample's positions, for samples that do not fit one GPU."
    )
    save_every_steps: int = Field(500, ge=1, description="Checkpoint interval in optimizer steps.")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bf16 on GPUs that have it.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the draft is trained.")
    compile: bool = Field(False, description="torch.compile the training step.")
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    prefetch_samples: int = Field(64, ge=1, description="Samples that the loader fetches ahead.")
    cpu_threads: int | None = Field(None, ge=1, description="Threads of one trainer process on CPU.")
    profile: ProfileSection | None = Field(None, description="Trace some steps into profiles/ of the run; default: no.")
    max_quarantined: float = Field(
        0.05, ge=0, le=1, description="The run fails with more samples quarantined: a share of those published."
    )
    max_diverged_windows: int = Field(
        5, ge=1, description="End after so many windows in a row whose loss or gradient is not finite."
    )
    heldout: HeldOutSection | None = Field(
        None, description="Measure the drafts on held-out samples while they are trained; default: no."
    )
    early_stop: EarlyStopSection | None = Field(
        None, description="End training when the held-out samples say that it gets no further; default: no."
    )

    @model_validator(mode="after")
    def _stopping_needs_measurements(self) -> TrainingSection:
        if self.early_stop is not None and self.heldout is None:
            raise ValueError("early_stop takes effect with training.heldout only, which says how to measure")
        return self

    @model_validator(mode="after")
    def _offloading_is_from_a_gpu(self) -> TrainingSection:
        if self.optimizer_offload and self.device == "cpu":
            raise ValueError("optimizer_offload: expected device: cuda or auto, found cpu, which has no other memory")
        return self

    @model_validator(mode="after")
    def _a_row_of_so_many_tokens_is_packed(self) -> TrainingSection:
        if self.pack_tokens is not None and self.packing is False:
            raise ValueError(
                f"expected packed micro-batches with pack_tokens, found packing: false and pack_tokens: "
                f"{self.pack_tokens}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _samples_are_shared_by_ranks_that_are_there(self) -> TrainingSection:
        ranks, shared_by = self.processes * self.nodes, self.context_parallel
        if ranks % shared_by:
            raise ValueError(
                f"expected a context_parallel that divides the number of ranks, processes x nodes ({ranks}), "
                f"found {shared_by}"
            )
        if shared_by > 1 and self.packing is False:
            raise ValueError(
                f"expected packed micro-batches with context_parallel, found packing: false and context_parallel: "
                f"{shared_by}; leave one of them out"
            )
        return self


if TYPE_CHECKING:
    DraftField = DraftSection
else:
    DraftField = draft_field()


class RunSpec(Section):
    """One training run of a draft model, or of several from one rollout."""

    run: RunSection = Field(default_factory=RunSection, description="Which run this is.")
    target: TargetSection = Field(description="The frozen target model.")
    draft: DraftField | None = Field(None, description="The draft model; by default EAGLE-3.")
    drafts: tuple[DraftField, ...] = Field(
        (), description="Instead of draft: several, each trained on every sample of the one rollout."
    )
    data: DataSection = Field(description="The prompts.")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="The producer.")
    store: StoreSection = Field(default_factory=StoreSection, description="The feature store.")
    channel: ChannelSection = Field(default_factory=ChannelSection, description="The reference channel.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="The consumer.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Evaluation.")
    gate: GateSection = Field(default_factory=GateSection, description="When a draft is promoted.")
    archive: ArchiveSection = Field(default_factory=ArchiveSection, description="Results.")
    registry: RegistrySection = Field(default_factory=RegistrySection, description="Versions of the draft.")
    recurring: RecurringSection | None = Field(None, description="Go on from the champion on what is new; default: no.")
    tracking: TrackingSection = Field(default_factory=TrackingSection, description="Trackers of the run's figures.")
    orchestration: OrchestrationSection = Field(default_factory=OrchestrationSection, description="Prefect.")

    @model_validator(mode="before")
    @classmethod
    def _one_draft_or_several(cls, document: Any) -> Any:
        return _with_drafts(document) if isinstance(document, dict) else document

    @model_validator(mode="after")
    def _drafts_have_names_of_their_own(self) -> RunSpec:
        names = [draft.label for draft in self.all_drafts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"drafts: expected a name for each draft, found {', '.join(twice)} more than once")
        return self

    @model_validator(mode="after")
    def _nights_fit(self) -> RunSpec:
        if self.published:
            _check_published(self)
        elif self.tracking.mlflow is not None and self.tracking.mlflow.registered_model is not None:
            raise ValueError(
                "tracking.mlflow.registered_model mirrors promotions; expected registry.publish or recurring beside it"
            )
        return self

    @model_validator(mode="after")
    def _devices_are_used(self) -> RunSpec:
        _check_devices(self)
        return self

    @property
    def all_drafts(self) -> tuple[DraftSection, ...]:
        """The drafts that are trained, at least one, in the document's order; each has another `label`."""
        return self.drafts if self.draft is None else (self.draft,)

    @property
    def published(self) -> bool:
        """Whether the draft becomes a version of the registry, and the gate decides about it."""
        return self.registry.publish or self.recurring is not None

    @property
    def held_out_prompts(self) -> int:
        """Prompts that are kept out of training: for the evaluation, and to measure drafts in training."""
        return self.evaluation.prompts + (self.training.heldout.prompts if self.training.heldout is not None else 0)

    @property
    def drafts_title(self) -> str:
        """What is trained, for people."""
        titles = ", ".join(f"{draft.title} ({draft.name})" if draft.name else draft.title for draft in self.all_drafts)
        return f"{titles} draft" if len(self.all_drafts) == 1 else f"{titles} drafts"

    @property
    def world_size(self) -> int:
        """Trainer processes over all nodes."""
        return self.training.processes * self.training.nodes

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step: world_size / context_parallel x batch_size x accumulation_steps."""
        training = self.training
        return self.world_size // training.context_parallel * training.batch_size * training.accumulation_steps


def _with_drafts(document: dict[str, Any]) -> dict[str, Any]:
    """Return `document` with one draft as `draft`, also where it stands in a list or nothing is said of it.

    Raises:
        ValueError: it has both `draft` and `drafts`.
    """
    draft, drafts = document.get("draft"), document.get("drafts")
    if draft is not None and drafts:
        raise ValueError("expected draft, or drafts for several, found both")
    alone = isinstance(drafts, (list, tuple)) and len(drafts) == 1
    if draft is not None or (drafts and not alone):
        return document
    return {**document, "draft": drafts[0] if drafts else {}, "drafts": ()}


def _check_published(spec: RunSpec) -> None:
    """Check what the gate needs, and what is the same in every night of recurring training.

    Raises:
        ValueError: it is not.
    """
    if len(spec.all_drafts) > 1:
        raise ValueError("registry.publish and recurring: expected one draft, found several; train them in runs apart")
    if spec.evaluation.min_accept_length is not None:
        raise ValueError(
            "evaluation.min_accept_length ends a run that is not published; expected gate.min_accept_length, which "
            "rejects the draft"
        )
    if not spec.evaluation.measured:
        raise ValueError("registry.publish and recurring: expected evaluation.prompts above 0 and at_end: the gate")
    if unknown := sorted(set(spec.gate.suites) - {HELD_OUT, *spec.evaluation.suites}):
        measured = ", ".join((HELD_OUT, *spec.evaluation.suites))
        raise ValueError(f"gate.suites: expected suites that are measured ({measured}), found {', '.join(unknown)}")
    if spec.recurring is None:
        return
    if spec.data.holdout is None:
        raise ValueError(
            "recurring: expected data.holdout, a file of held-out prompts: what one night would keep out of its own "
            "prompts, another one has trained on"
        )


def _check_devices(spec: RunSpec) -> None:
    """Check that each role has at least as many GPUs listed as it puts to use.

    Raises:
        ValueError: it has not, or it is told to run on the CPU.
    """
    devices, target, training = spec.orchestration.devices, spec.target, spec.training
    if devices.train is not None:
        _expect("train", devices.train, training.device, training.processes, "training.processes")
    if devices.rollout is not None:
        serving = target.backend == "sglang" and not target.server_urls
        wanted = target.servers * target.tensor_parallel if serving else None
        _expect("rollout", devices.rollout, target.device, wanted, "target.servers x target.tensor_parallel")


def _expect(role: str, given: Devices, device: str, wanted: int | None, what: str) -> None:
    if device == "cpu":
        raise ValueError(f"orchestration.devices.{role}: expected no GPUs for a role on the CPU, found {list(given)}")
    if wanted is not None and len(given) < wanted:
        raise ValueError(
            f"orchestration.devices.{role}: expected at least {wanted} GPUs ({what}), found {len(given)}: {list(given)}"
        )

"""Everything that is checked before a process is started or a GPU is held, and the plan that comes of it.

Three depths: `sketch_plan` needs the target's config and the prompts file; `check_run` also the tokenizer and every
line of the prompts; `prepare_run` also writes what the roles need into the run's directory.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from disagg_core.channel.redis.address import RedisAddress, check_server
from disagg_core.errors import BadInput, ChannelUnavailable, TargetError
from disagg_core.files import write_atomically
from disagg_core.prompts.checks import heldout_prompts, validate_prompts
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_plan
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.devices import check_shared_node
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.section import is_local
from disagg_core.settings import Settings
from disagg_core.store import require_mooncake
from disagg_core.store.capacity import check_capacity
from disagg_core.target.facts import TargetFacts, read_target_facts
from disagg_core.target.tokenizer import load_tokenizer, template_text, tokenizer_version


def sketch_plan(spec: RunSpec, settings: Settings) -> RunPlan:
    """Return the plan of `spec` as far as it can be known without weights and tokenizer.

    Raises:
        BadInput: the target's config, the prompts or the numbers of the spec are wrong.
    """
    facts = read_target_facts(spec.target)
    prompts = validate_prompts(spec, None, facts)
    run_id = f"{spec.run.name}-plan"
    return make_plan(
        spec, facts, run_id=run_id, root=RunDir.of(settings.runs_dir, run_id).root, total_prompts=prompts.total
    )


def check_run(spec: RunSpec, settings: Settings, run_id: str | None = None) -> RunPlan:
    """Check that the run can be started on this machine and return its plan; writes nothing.

    Raises:
        BadInput: something in the spec, its files, the target or the machine's libraries is wrong.
    """
    require_mooncake()
    facts = read_target_facts(spec.target)
    _check_weights(spec)
    if spec.store.mode == "managed":
        check_capacity(spec.store.capacity)
    if spec.channel.url is not None:
        RedisAddress.parse(spec.channel.url)
    tokenizer = load_tokenizer(spec.target)
    prompts = validate_prompts(spec, tokenizer, facts)
    run_id = run_id or f"{spec.run.name}-check"
    return make_plan(
        _pinned(spec, facts),
        facts,
        run_id=run_id,
        root=RunDir.of(settings.runs_dir, run_id).root,
        total_prompts=prompts.total,
        tokenizer_version=tokenizer_version(tokenizer, template_text(tokenizer, spec.data.chat_template)),
    )


def check_channel(spec: RunSpec, settings: Settings) -> None:
    """Check that the channel's server answers this machine; for a run whose roles are all here.

    Raises:
        BadInput: it refuses us or does not answer.
    """
    url = spec.channel.url
    if url is None:
        return
    try:
        check_server(url, password=settings.redis_password, ca=settings.redis_ca if url.startswith("rediss:") else None)
    except ChannelUnavailable as error:
        raise BadInput(f"channel.url: {error}") from error


def check_gpus(spec: RunSpec) -> None:
    """Check that the roles have GPUs of their own; for a run whose roles are all on this machine.

    Raises:
        BadInput: two would have the same one, or one that is not there.
    """
    import torch  # 2 s that no other check needs

    check_shared_node(spec, torch.cuda.device_count())


def prepare_run(spec: RunSpec, run_id: str, settings: Settings) -> RunPlan:
    """Check the run, write run.json and the evaluation prompts into its directory, and return its plan.

    Raises:
        BadInput: as `check_run`; or the directory holds a run of another spec.
    """
    plan = check_run(spec, settings, run_id)
    if plan.dir.document.is_file():
        known = read_plan(plan.dir)
        if known.spec != plan.spec:
            raise BadInput(f"run {run_id} exists with another spec in {plan.root}; choose another run.name")
    write_atomically(plan.dir.document, plan.model_dump_json(indent=2))
    if spec.evaluation.prompts:
        held_out = heldout_prompts(spec, load_tokenizer(spec.target), spec.evaluation.prompts)
        lines = b"".join(msgspec.json.encode({"input_ids": ids}) + b"\n" for ids in held_out)
        write_atomically(plan.dir.evaluation / "prompts.jsonl", lines)
    return plan


def _pinned(spec: RunSpec, facts: TargetFacts) -> RunSpec:
    """Return `spec` with a hub model's revision fixed to the commit it is now, so that all roles load the same one."""
    if facts.commit is None:
        return spec
    return spec.model_copy(update={"target": spec.target.model_copy(update={"revision": facts.commit})})


def _check_weights(spec: RunSpec) -> None:
    """Refuse a local target without weights, unless a server has them."""
    model = spec.target.model
    if not is_local(model) or spec.target.server_urls:
        return
    if not any(Path(model).expanduser().glob("*.safetensors")):
        raise TargetError(f"target.model: {model} holds no *.safetensors weights; save the model in safetensors format")

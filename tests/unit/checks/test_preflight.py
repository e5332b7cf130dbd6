"""What is checked and fixed before a run: the machine, the target's revision, the run's directory."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import msgspec
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Qwen3NextConfig,
)

from disagg_core.checks.findings import NotReady
from disagg_core.checks.preflight import _as_planned, _pinned, check_run, draft_configs, prepare_run, sketch_plan
from disagg_core.checks.resources import DiskTooSmall
from disagg_core.checks.services import check_channel, check_registry
from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft
from disagg_core.drafts.matrices import hidden_matrices
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import BadInput, IncompatibleDraft, TargetError
from disagg_core.prompts.pinned import DataChanged
from disagg_core.report.archive import ArchiveUnusable, probe_archive
from disagg_core.roles.evaluation import read_prompts
from disagg_core.roles.producer import _open_prompts
from disagg_core.run_spec.document import ArchiveSection, RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from disagg_core.target.facts import read_target_facts
from tests.ports import free_port

pytestmark = pytest.mark.unit

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"

TARGET = DEMO.parent.parent / "demo" / "target"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def a_spec(*overrides: str) -> RunSpec:
    return load_spec(DEMO, ["data.limit=40", *overrides])


def test_a_prepared_run_has_its_document_and_its_held_out_prompts(settings: Settings) -> None:
    plan = prepare_run(a_spec(), "demo-1", settings)
    assert (plan.total_prompts, plan.total_steps) == (40, 5)
    assert plan.dir.document.is_file()
    lines = (plan.dir.evaluation / "prompts.jsonl").read_bytes().splitlines()
    assert len(lines) == 16
    assert all(msgspec.json.decode(line)["input_ids"] for line in lines)
    assert prepare_run(a_spec(), "demo-1", settings) == plan


def test_another_spec_does_not_take_over_a_run(settings: Settings) -> None:
    prepare_run(a_spec(), "demo-1", settings)
    with pytest.raises(BadInput, match="demo-1 exists with another spec"):
        prepare_run(a_spec("training.batch_size=4"), "demo-1", settings)


def test_checking_writes_nothing(settings: Settings, tmp_path: Path) -> None:
    check_run(a_spec(), settings)
    assert list(tmp_path.iterdir()) == []


def test_a_channel_whose_server_is_not_there_is_refused(settings: Settings) -> None:
    check_channel(a_spec(), settings)
    with pytest.raises(BadInput, match=r"channel.url: redis://127.0.0.1:\d+/0 cannot be used"):
        check_channel(a_spec(f"channel.url=redis://127.0.0.1:{free_port()}/0"), settings)
    with pytest.raises(BadInput, match="no valid host and port"):
        check_run(a_spec("channel.url=redis://127.0.0.1:port/0"), settings)


def test_a_target_without_weights_is_named(settings: Settings, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in TARGET.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TargetError, match=r"bare holds no \*.safetensors weights"):
        check_run(a_spec(f"target.model={bare}"), settings)


def test_a_hub_model_is_pinned_to_the_commit_of_now() -> None:
    spec = a_spec()
    facts = read_target_facts(spec.target)
    assert _pinned(spec, facts) == spec
    assert _pinned(spec, facts.model_copy(update={"commit": "abc"})).target.revision == "abc"


# --- the data of a run ------------------------------------------------------------------------------------------------


def with_own_prompts(tmp_path: Path, *overrides: str) -> tuple[Path, RunSpec]:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join((DEMO.parent.parent / "demo" / "prompts.jsonl").read_bytes().splitlines(True)[:200]))
    own = [f"data.prompts={path}", "data.limit=null", "data.holdout=null", *overrides]
    return path, load_spec(DEMO, own)


def test_a_run_that_is_tried_again_keeps_the_data_that_it_was_planned_with(settings: Settings, tmp_path: Path) -> None:
    path, spec = with_own_prompts(tmp_path)
    plan = prepare_run(spec, "demo-1", settings)
    decoded = (plan.dir.evaluation / "prompts.jsonl").read_bytes()
    with path.open("ab") as file:
        file.write(path.read_bytes()[:2000].rpartition(b"\n")[0] + b"\n")
    assert prepare_run(spec, "demo-1", settings) == plan
    assert (plan.dir.evaluation / "prompts.jsonl").read_bytes() == decoded
    assert prepare_run(spec, "demo-2", settings).total_prompts != plan.total_prompts, "a new run takes all of it"

    path.write_bytes(path.read_bytes()[1:])
    with pytest.raises(DataChanged, match=r"prompts\.jsonl: expected the \d+ bytes"):
        prepare_run(spec, "demo-1", settings)
    with pytest.raises(DataChanged), contextlib.ExitStack() as stack:
        _open_prompts(plan, stack)


def test_a_run_that_is_tried_again_keeps_the_revision_that_it_was_planned_with(settings: Settings) -> None:
    spec = a_spec()
    known = prepare_run(spec, "demo-1", settings)
    revised = known.spec.target.model_copy(update={"revision": "abc"})
    planned = known.model_copy(
        update={
            "target": known.target.model_copy(update={"commit": "abc"}),
            "spec": known.spec.model_copy(update={"target": revised}),
        }
    )
    assert _as_planned(spec, planned) == planned.spec


def test_the_evaluation_decodes_the_planned_prompts_and_no_others(settings: Settings) -> None:
    plan = prepare_run(a_spec(), "demo-1", settings)
    path = plan.dir.evaluation / "prompts.jsonl"
    assert plan.data is not None
    assert len(read_prompts(path, 16, plan.data.evaluation)) == 16
    path.write_bytes(path.read_bytes().replace(b"[", b"[1,", 1))
    with pytest.raises(DataChanged, match=r"evaluation/prompts\.jsonl"):
        read_prompts(path, 16, plan.data.evaluation)


# --- everything at once, before a GPU is held -------------------------------------------------------------------------


def test_all_that_keeps_a_run_from_starting_is_told_at_once(settings: Settings, tmp_path: Path) -> None:
    spec = a_spec(
        "archive.url=nosuch://bucket/x",
        f"draft.init_from={tmp_path}/nowhere",
        "draft.vocab_size=null",
        f"channel.url=redis://127.0.0.1:{free_port()}/0",
        "store.mode=external",
        f"store.master_address=127.0.0.1:{free_port()}",
        f"store.metrics_address=127.0.0.1:{free_port()}",
    )

    def no_worker() -> None:
        raise BadInput("the work pool gpu-train has no worker online")

    with pytest.raises(NotReady) as caught:
        prepare_run(spec, "demo-1", settings, also=[no_worker])
    listed = str(caught.value).splitlines()
    assert listed[0] == "5 things keep this run from starting:"
    for number, what in enumerate(
        ["draft.init_from: ", "archive.url: nosuch://", "channel.url: redis://", "store.master_address: ", "no worker"]
    ):
        assert listed[number + 1].startswith(f"{number + 1}. ")
        assert what in listed[number + 1]
    assert not settings.runs_dir.exists(), "nothing was begun"


def test_the_plan_names_what_can_be_known_without_weights(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(
        NotReady, match=r"2 things .*\n1\. draft\.init_from.*\n2\. archive\.url: gs://.*draftline\[gcs\]"
    ):
        sketch_plan(
            a_spec("archive.url=gs://bucket/x", f"draft.init_from={tmp_path}/nowhere", "draft.vocab_size=null"),
            settings,
        )


@pytest.mark.parametrize(
    "url", ["gs://bucket/drafts", "nosuch://x", "/proc/nowhere", "{file}", "{file}/below", "://bucket"]
)
def test_an_archive_that_cannot_be_written_is_refused(settings: Settings, tmp_path: Path, url: str) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ArchiveUnusable, match=r"archive\.url: "):
        check_run(a_spec(f"archive.url={url.format(file=tmp_path / 'file')}"), settings)


def test_an_archive_is_written_to_read_and_left_as_it_was(settings: Settings, tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}/not/there", f"memory://{tmp_path.name}/drafts"):
        check_run(a_spec(f"archive.url={url}"), settings)
    assert list(tmp_path.iterdir()) == []
    assert fsspec.filesystem("memory").find(f"/{tmp_path.name}") == []


# --- the registry of a run that publishes its draft ----------------------------------------------------------------


def publishing(url: str) -> RunSpec:
    return a_spec("registry.publish=true", f"registry.url={url}", "evaluation.min_accept_length=null")


@pytest.mark.parametrize("url", ["gs://bucket/drafts", "/proc/nowhere", "{file}/below", "://bucket"])
def test_a_registry_that_cannot_be_written_is_refused_before_the_run(
    settings: Settings, tmp_path: Path, url: str
) -> None:
    (tmp_path / "file").write_text("a file")
    url = url.format(file=tmp_path / "file")
    with pytest.raises(BadInput, match=r"registry\.url: "):
        check_registry(publishing(url), settings)
    check_registry(a_spec(f"registry.url={url}"), settings)  # nothing is published there


def test_a_registry_is_probed_with_the_rest_and_left_as_it_was(settings: Settings, tmp_path: Path) -> None:
    for url in (str(tmp_path / "registry"), f"memory://{tmp_path.name}/registry"):
        check_registry(publishing(url), settings)
    assert list(tmp_path.iterdir()) == []
    assert fsspec.filesystem("memory").find(f"/{tmp_path.name}") == []
    with pytest.raises(NotReady, match=r"\d\. archive\.url: .*\n\d\. registry\.url: "):
        sketch_plan(
            publishing("gs://bucket/drafts").model_copy(update={"archive": ArchiveSection(url="gs://x")}), settings
        )


def test_a_registry_where_two_could_both_promote_is_refused_before_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = fsspec.filesystem("memory")
    write = storage.pipe_file
    monkeypatch.setattr(storage, "pipe_file", lambda path, data, mode: write(path, data))
    with pytest.raises(BadInput, match=r"registry\.url: .*two who promote at once would both win"):
        check_registry(publishing(f"memory://{tmp_path.name}/registry"), settings)
    assert storage.find(f"/{tmp_path.name}") == []


def test_a_storage_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    away = threading.Event()
    monkeypatch.setattr(fsspec.filesystem("memory"), "open", lambda *_, **__: away.wait())
    try:
        with pytest.raises(ArchiveUnusable, match=r"memory://x: not written to, read and deleted from within 0\.1 s"):
            probe_archive("memory://x", timeout_s=0.1)
    finally:
        away.set()


@pytest.fixture
def disk_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have every disk have so many bytes free."""

    def have(free: int) -> None:
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("disagg_core.checks.resources.shutil", SimpleNamespace(disk_usage=lambda _: usage))

    return have


LOGS = 64 << 20


def test_a_disk_that_the_run_would_fill_is_named(settings: Settings, disk_with: Callable[[int], None]) -> None:
    plan = check_run(a_spec(), settings)
    ((_, config),) = draft_configs(plan)
    parameters, keep = method_of("eagle3").parameters(config), plan.spec.archive.keep
    needed = ((keep + 1) * 12 + 4 + 2) * parameters  # of checkpoints, one without optimizer, and the export
    needed += keep * 12 * parameters + 2 * parameters  # of an archive on the same disk

    disk_with(needed)  # and nothing for logs
    with pytest.raises(
        DiskTooSmall, match=r"free for 2 checkpoints of .*untrained.*an export of .*an archive of .*found"
    ):
        check_run(a_spec(), settings)
    disk_with(needed + LOGS)
    check_run(a_spec(), settings)
    disk_with(needed + LOGS - 1000)
    written = plan.dir.checkpoints / "step-0" / "draft.safetensors"
    written.parent.mkdir(parents=True)
    written.write_bytes(bytes(1000))
    check_run(a_spec(), settings, plan.run_id)


def test_archives_of_other_runs_are_no_room_for_this_one(settings: Settings, disk_with: Callable[[int], None]) -> None:
    older = settings.home / "archive" / "older" / "draft.safetensors"
    older.parent.mkdir(parents=True)
    with older.open("wb") as file:
        file.truncate(1 << 30)
    disk_with(1 << 20)
    with pytest.raises(DiskTooSmall):
        check_run(a_spec(), settings)


def test_a_disk_has_to_hold_what_optimizer_best_checkpoint_and_registry_add(
    settings: Settings, disk_with: Callable[[int], None]
) -> None:
    def fits_exactly(needed: int, spec: RunSpec) -> bool:
        disk_with(needed)
        check_run(spec, settings)
        disk_with(needed - 1)
        with pytest.raises(DiskTooSmall):
            check_run(spec, settings)
        return True

    plan = check_run(a_spec("archive.keep=2"), settings)
    ((draft, config),) = draft_configs(plan)
    weights = 4 * draft.method.parameters(config)
    matrices = 4 * sum(matrix.numel() for matrix in hidden_matrices(draft.method.model(config)))

    def needed(checkpoint: int, best: int = 0) -> int:
        return (3 + best + 2 + best) * checkpoint + weights + weights + LOGS  # step 0, and two exports of half as much

    assert fits_exactly(needed(3 * weights), a_spec("archive.keep=2"))
    assert fits_exactly(needed(3 * weights - matrices), a_spec("archive.keep=2", "training.optimizer=muon"))

    measured = a_spec("archive.keep=2", "training.heldout.every_steps=5", "training.heldout.prompts=4")
    assert fits_exactly(needed(3 * weights, best=1) + 4 * plan.max_sample_bytes, measured)

    published = publishing(str(settings.home / "registry"))
    published = published.model_copy(update={"archive": ArchiveSection(keep=2)})
    exports = len(draft.method.formats) * weights // 2
    assert fits_exactly(needed(3 * weights) + exports + exports + weights, published)


def test_a_draft_to_continue_that_does_not_fit_is_named(settings: Settings, tmp_path: Path) -> None:
    plan = check_run(a_spec(), settings)
    draft = Eagle3Draft(Eagle3Config.for_target(plan.target, plan.spec.draft))
    draft.set_vocab_map(VocabMap.from_counts(torch.ones(plan.target.vocab_size), plan.drafts[0].vocabulary.size))
    for name, changes in {"fits": {}, "other": {"aux_layer_ids": (0, 1, 3)}}.items():
        folder = tmp_path / "drafts" / name
        folder.mkdir(parents=True)
        save_file(draft.serving_state_dict(), folder / "draft.safetensors")
        config = draft.config.model_copy(update=changes)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
    fitting = [f"draft.init_from={tmp_path}/drafts/fits", "draft.vocab_size=null"]
    check_run(a_spec(*fitting), settings)
    with pytest.raises(IncompatibleDraft, match=r"init_from: .*captured layers: expected .*, found \(0, 1, 3\)"):
        check_run(a_spec(f"draft.init_from={tmp_path}/drafts/other", "draft.vocab_size=null"), settings)
    (tmp_path / "drafts" / "fits" / "draft.safetensors").unlink()
    with pytest.raises(IncompatibleDraft, match=r"draft\.init_from: .*expected model\.safetensors"):
        check_run(a_spec(*fitting), settings)


def test_a_draft_that_only_its_method_can_refuse_is_refused_before_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sketch_plan(a_spec(), settings)
    draft = Eagle3Draft(Eagle3Config.for_target(plan.target, plan.spec.draft))
    draft.set_vocab_map(VocabMap.identity(plan.target.vocab_size))
    save_file(draft.serving_state_dict(), tmp_path / "draft.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(draft.config.to_dict()))

    def refuses(*_: object) -> None:
        raise IncompatibleDraft("made for a deeper target")

    monkeypatch.setattr(type(method_of("eagle3")), "continued", refuses)
    with pytest.raises(IncompatibleDraft, match="made for a deeper target"):
        sketch_plan(a_spec(f"draft.init_from={tmp_path}"), settings)


def test_a_hybrid_target_passes_with_its_evaluation_as_any_other(settings: Settings, tmp_path: Path) -> None:
    hybrid = tmp_path / "hybrid"
    shutil.copytree(TARGET, hybrid)
    document = json.loads((hybrid / "config.json").read_text())
    kinds = ["linear_attention"] + ["full_attention"] * (document["num_hidden_layers"] - 1)
    facts = read_target_facts(a_spec().target)
    sizes = {name: getattr(facts, name) for name in ("hidden_size", "vocab_size", "num_attention_heads", "head_dim")}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    config = Qwen3NextConfig(
        **sizes, num_hidden_layers=facts.num_layers, layer_types=kinds, intermediate_size=64, rope_parameters=rope
    )
    config.save_pretrained(hybrid)
    named = [f"target.model={hybrid}", "evaluation.min_accept_length=null"]
    check_run(a_spec(*named), settings)
    plan = prepare_run(a_spec(*named, "evaluation.at_end=false"), "demo-1", settings)
    assert len(read_prompts(plan.dir.evaluation / "prompts.jsonl", 16)) == 16, "for a server to decode later"
    check_run(a_spec(*named, "evaluation.prompts=0"), settings)

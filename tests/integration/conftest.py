"""A real Mooncake store, a real channel, and a tiny target on disk: the producer with everything around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import Capture, RunIdentity
from disagg_core.prompts.checks import validate_prompts
from disagg_core.run.plan import RoleAssignment, RunPlan, make_plan
from disagg_core.run_spec.document import RunSpec
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from disagg_core.target.tokenizer import template_text, tokenizer_version
from tests.integration.rollout.rollout_kit import write_prompts
from tests.integration.two_hosts import two_hosts

__all__ = ["two_hosts"]

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreEndpoints]:
    """A store of 128 MiB that lives as long as the tests of this process; each uses namespaces of its own."""
    with managed_store(128 << 20, log_dir=tmp_path_factory.mktemp("mooncake")) as found:
        yield found


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with a tokenizer of single characters and a ChatML template."""
    path = tmp_path_factory.mktemp("target")
    alphabet = ["<unk>", "<|im_start|>", "<|im_end|>", "\n", *map(chr, range(32, 127))]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(alphabet)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def make_assignment(model_dir: Path, tmp_path: Path, endpoints: StoreEndpoints) -> Callable[..., RoleAssignment]:
    """Make the assignment of a run over `count` prompts; further sections of the spec by name."""

    def make(count: int = 24, attempt: int = 1, **sections: dict[str, object]) -> RoleAssignment:
        prompts = tmp_path / "prompts.jsonl"
        if not prompts.exists():
            write_prompts(prompts, count)
        document: dict[str, dict[str, object]] = {
            "target": {"model": str(model_dir), "dtype": "float32", "device": "cpu"},
            "data": {"prompts": str(prompts), "max_tokens": 96},
            "store": {"capacity": 64 << 20},
            "training": {"batch_size": 2},
            "evaluation": {"prompts": 0},
        }
        for name, section in sections.items():
            document[name] = {**document.get(name, {}), **section}
        spec = RunSpec.model_validate(document)
        return RoleAssignment(plan=plan_of(spec, tmp_path), attempt=attempt, store=endpoints)

    return make


def plan_of(spec: RunSpec, root: Path) -> RunPlan:
    from disagg_core.target.tokenizer import load_tokenizer

    facts = read_target_facts(spec.target)
    tokenizer = load_tokenizer(spec.target)
    return make_plan(
        spec,
        facts,
        run_id=f"run-{root.name.replace('[', '-').replace(']', '')}",
        root=root / "run",
        total_prompts=validate_prompts(spec, tokenizer, facts).total,
        tokenizer_version=tokenizer_version(tokenizer, template_text(tokenizer, None)),
    )


@pytest.fixture
def bench(tmp_path: Path, endpoints: StoreEndpoints) -> Iterator[SimpleNamespace]:
    """Store, channel and identity for a producer without a role process around it."""
    run_id = f"bench-{tmp_path.name}"
    identity = RunIdentity(
        run_id=run_id, attempt=1, strategy="eagle3", target_model_version="t", tokenizer_version="k",
        vocab_map_version="v", draft_weight_version=0, capture=Capture((0, 1, 2), True), dtype="float32",
    )  # fmt: skip
    with MooncakeFeatureStore(endpoints, namespace=f"{run_id}/1", staging_bytes=4 << 20) as store:
        opened: list[StreamingRefChannel] = []

        def open_channel(**options: object) -> StreamingRefChannel:
            opened.append(StreamingRefChannel(tmp_path / "channel", run_id=run_id, **options))
            return opened[-1]

        yield SimpleNamespace(store=store, identity=identity, open_channel=open_channel, path=tmp_path)
        for channel in opened:
            channel.disconnect()
        store.sweep()

"""`TransformersTarget`: what it captures and generates is what a plain forward pass of the model gives."""

from __future__ import annotations

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config

from disagg_core.contracts import Capture, PromptTask, RunIdentity
from disagg_core.engines.contract import Captured, Failed, Generated
from disagg_core.engines.generation import Sampling, choose_tokens
from disagg_core.engines.transformers import TransformersTarget, group_for
from disagg_core.errors import TargetBroken, TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
CAPTURE = Capture((0, 1, 3), last_hidden_state=True)
GREEDY = Sampling(max_new_tokens=12, max_tokens=60, temperature=0.0, top_p=1.0, seed=5)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[LlamaConfig, Qwen3Config], ids=["llama", "qwen3"])
def model_dir(request, tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("target")
    AutoModelForCausalLM.from_config(request.param(**SIZES)).save_pretrained(path)
    return path


@pytest.fixture
def make_target(model_dir):
    made = []

    def make(dtype="float32", capture=CAPTURE, **options):
        section = TargetSection(model=str(model_dir), dtype=dtype, device="cpu")
        facts = read_target_facts(section)
        target = TransformersTarget(section, facts, capture, **options)
        target.prepare(identity_of(facts, capture=capture))
        made.append(target)
        return target

    yield make
    for target in made:
        target.close()


def identity_of(facts, **changes):
    fields = {
        "run_id": "r",
        "attempt": 1,
        "strategy": "eagle3",
        "target_model_version": facts.version,
        "tokenizer_version": "",
        "vocab_map_version": "",
        "draft_weight_version": 0,
        "capture": CAPTURE,
        "dtype": facts.dtype,
    }
    return RunIdentity(**{**fields, **changes})


def tasks_of(*lengths, first=0):
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randint(4, 64, (length,), generator=generator).tolist() for length in lengths]
    return [
        PromptTask(ordinal=first + n, source="", input_ids=ids, loss_mask=[1] * len(ids)) for n, ids in enumerate(rows)
    ]


def plain(model_dir, ids, layers, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    return torch.cat([out.hidden_states[layer + 1][0] for layer in layers], -1), out.hidden_states[-1][0], out.logits[0]


def captured(target, tasks):
    outcomes = list(target.capture(tasks, avoid={}))
    assert all(isinstance(outcome, Captured) for outcome in outcomes), outcomes
    return {outcome.task.ordinal: outcome for outcome in outcomes}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_ragged_prompts_in_one_batch_equal_plain_forwards(make_target, model_dir, dtype, tolerance):
    target = make_target(dtype)
    tasks = tasks_of(5, 17, 40, 9)
    found = captured(target, tasks)
    for task in tasks:
        sample = found[task.ordinal]
        aux, last, _ = plain(model_dir, task.input_ids, CAPTURE.layers, getattr(torch, dtype))
        assert sample.tensors["aux_hidden_states"].shape == (len(task.input_ids), 96)
        assert sample.tensors["aux_hidden_states"].dtype == getattr(torch, dtype)
        torch.testing.assert_close(sample.tensors["aux_hidden_states"], aux, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(sample.tensors["last_hidden_state"], last, atol=tolerance, rtol=tolerance)
        assert sample.tensors["input_ids"].tolist() == task.input_ids
        assert sample.num_tokens == len(task.input_ids)


@pytest.mark.parametrize("layers", [(2,), (1, 3), (0, 1, 2, 3)])
def test_any_layers_are_captured_with_or_without_the_last_hidden_state(make_target, model_dir, layers):
    tasks = tasks_of(5, 17, 9)
    bare = captured(make_target(capture=Capture(layers, last_hidden_state=False)), tasks)
    full = captured(make_target(capture=Capture(layers, last_hidden_state=True)), tasks)
    for task in tasks:
        aux, last, _ = plain(model_dir, task.input_ids, layers)
        assert list(bare[task.ordinal].tensors) == ["input_ids", "loss_mask", "aux_hidden_states"]
        torch.testing.assert_close(bare[task.ordinal].tensors["aux_hidden_states"], aux, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(full[task.ordinal].tensors["last_hidden_state"], last, atol=1e-5, rtol=1e-5)


def test_the_tensors_own_their_memory(make_target):
    target = make_target()
    (first, second) = captured(target, tasks_of(6, 6)).values()
    first.tensors["aux_hidden_states"].zero_()
    assert second.tensors["aux_hidden_states"].any()
    assert not first.tensors["last_hidden_state"].is_inference()


def test_continuations_are_what_the_model_says_next(make_target, model_dir):
    target = make_target(sampling=GREEDY)
    tasks = tasks_of(7, 30, 12, 55)
    for task in tasks:
        sample = captured(target, tasks)[task.ordinal]
        ids, start = sample.tensors["input_ids"].tolist(), len(task.input_ids)
        aux, _, logits = plain(model_dir, ids, CAPTURE.layers)
        assert ids[:start] == task.input_ids
        assert ids[start:] == logits[start - 1 : -1].argmax(-1).tolist()
        assert len(ids) <= 60
        assert ids[-1] == 3 or len(ids) == min(60, start + 12)
        assert 3 not in ids[start:-1]
        assert sample.tensors["loss_mask"].tolist() == [0] * start + [1] * (len(ids) - start)
        torch.testing.assert_close(sample.tensors["aux_hidden_states"], aux, atol=1e-5, rtol=1e-5)


def test_a_continuation_that_is_known_is_captured_as_it_is(make_target):
    target = make_target(sampling=GREEDY)
    (task,) = tasks_of(7)
    known = msgspec.structs.replace(task, continuation=[9, 8, 7])
    sample = captured(target, [known])[0].tensors
    assert sample["input_ids"].tolist() == [*task.input_ids, 9, 8, 7]
    assert sample["loss_mask"].tolist() == [0] * 7 + [1] * 3


def test_sampling_depends_on_seed_and_ordinal_and_not_on_the_batch(make_target):
    def continuations(seed, tasks):
        sampling = Sampling(max_new_tokens=12, max_tokens=60, temperature=1.0, top_p=0.95, seed=seed)
        outcomes = make_target(sampling=sampling).generate(tasks, avoid={})
        return {o.task.ordinal: o.tokens for o in outcomes if isinstance(o, Generated)}

    tasks = tasks_of(8, 8, 8, 8)
    together = continuations(1, tasks)
    alone = {task.ordinal: continuations(1, [task])[task.ordinal] for task in tasks}
    assert together == alone
    assert continuations(2, tasks) != together
    same_prompt = [PromptTask(ordinal=n, source="", input_ids=[5, 6, 7], loss_mask=[0] * 3) for n in range(4)]
    assert len({tuple(tokens) for tokens in continuations(1, same_prompt).values()}) > 1


def test_sampled_tokens_follow_the_distribution_inside_the_nucleus():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(20_000, 1)
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = Sampling(max_new_tokens=1, max_tokens=9, temperature=1.0, top_p=1.0, seed=0)
    shares = choose_tokens(logits, draws, free).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.01, rtol=0)
    nucleus = Sampling(max_new_tokens=1, max_tokens=9, temperature=1.0, top_p=0.7, seed=0)
    shares = choose_tokens(logits, draws, nucleus).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.01, rtol=0)


def test_unusable_prompts_are_told_apart_and_the_others_captured(make_target):
    target = make_target()
    too_long, foreign = tasks_of(129)[0], PromptTask(ordinal=1, source="", input_ids=[1, 64], loss_mask=[1, 1])
    good = tasks_of(5, first=2)[0]
    outcomes = {outcome.task.ordinal: outcome for outcome in target.capture([too_long, foreign, good], avoid={})}
    assert isinstance(outcomes[2], Captured)
    assert isinstance(outcomes[0], Failed)
    assert not outcomes[0].retryable
    assert "at most 128 tokens" in outcomes[0].reason
    assert "token id 64" in outcomes[1].reason


def test_a_batch_that_fails_is_split_down_to_the_prompt_at_fault(make_target):
    target = make_target()
    module = target._states.decoder.module
    decoder = module.forward

    def choke(input_ids, **options):
        if (input_ids == 63).any():
            raise RuntimeError("choked")
        return decoder(input_ids=input_ids, **options)

    module.forward = choke
    tasks = [PromptTask(ordinal=n, source="", input_ids=[63 if n == 2 else 5] * 6, loss_mask=[1] * 6) for n in range(5)]
    outcomes = {outcome.task.ordinal: outcome for outcome in target.capture(tasks, avoid={})}
    assert [n for n, outcome in outcomes.items() if isinstance(outcome, Failed)] == [2]
    assert (outcomes[2].retryable, outcomes[2].reason) == (True, "RuntimeError: choked")


@pytest.mark.parametrize("last", [True, False])
def test_hidden_states_that_are_not_finite_are_rejected(make_target, last):
    target = make_target(capture=Capture((0, 1, 3), last_hidden_state=last))
    with torch.no_grad():
        target._model.get_input_embeddings().weight[7] = float("nan")
    task = PromptTask(ordinal=0, source="", input_ids=[7, 7, 7], loss_mask=[1] * 3)
    (outcome,) = target.capture([task], avoid={})
    assert isinstance(outcome, Failed)
    assert not outcome.retryable


@pytest.mark.parametrize(
    "change",
    [
        {"target_model_version": "other"},
        {"capture": Capture((0, 1, 2), last_hidden_state=True)},
        {"capture": Capture((0, 1, 3), last_hidden_state=False)},
        {"dtype": "bfloat16"},
    ],
)
def test_a_target_of_another_identity_is_refused(model_dir, change):
    section = TargetSection(model=str(model_dir), dtype="float32", device="cpu")
    facts = read_target_facts(section)
    with pytest.raises(TargetError, match="expected"):
        TransformersTarget(section, facts, CAPTURE).prepare(identity_of(facts, **change))


def test_a_model_that_is_not_the_planned_one_is_refused(model_dir):
    section = TargetSection(model=str(model_dir), dtype="float32", device="cpu")
    facts = read_target_facts(section)
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 6}))
    with pytest.raises(TargetError, match="expected 5 layers of hidden size 32, found 6 of 32"):
        TransformersTarget(section, facts, CAPTURE, model=other).prepare(identity_of(facts))


def test_groups_fill_the_token_budget_and_no_more():
    assert [group_for(tokens) for tokens in (8, 1024, 8192, 10**6)] == [1, 16, 64, 64]


def dying(target, after, error):
    """Let every forward pass after the first `after` ones raise `error`, as after a sticky CUDA error."""
    module = target._states.decoder.module
    healthy, passes = module.forward, 0

    def forward(*args, **options):
        nonlocal passes
        passes += 1
        if passes > after:
            raise error
        return healthy(*args, **options)

    module.forward = forward


@pytest.mark.parametrize("after", [0, 1, 2], ids=["before the first", "after one batch", "after two"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "infrastructure"),
        (RuntimeError("CUDA error: unspecified launch failure"), "infrastructure"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
    ],
)
def test_a_target_that_fails_with_a_known_good_batch_blames_no_prompt(make_target, after, error, expected):
    target = make_target(batch_tokens=64)
    dying(target, after, error)
    outcomes = []
    with pytest.raises(TargetBroken, match="known to be good") as broken:
        outcomes.extend(target.capture(tasks_of(*[30] * 12), avoid={}))
    assert not [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    assert broken.value.failure_class == expected


def test_a_target_that_dies_while_it_generates_blames_no_prompt(make_target):
    target = make_target(sampling=GREEDY)
    dying(target, 5, torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
    with pytest.raises(TargetBroken):
        list(target.capture(tasks_of(7, 30, 12), avoid={}))


def test_every_decoding_step_and_batch_is_counted_as_work(make_target):
    target = make_target(sampling=GREEDY)
    steps = []
    for outcome in target.capture(tasks_of(7, 7), avoid={}):
        steps.append(target.health()[0].worked)
        longest = outcome.num_tokens - 7
    assert steps[-1] >= longest + 1, "its decoding steps, and the batch that was captured"

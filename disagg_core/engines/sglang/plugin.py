"""The plugin that stock SGLang loads in its own processes: four hooks that capture samples, and nothing else.

Loaded by SGLang through the entry point group ``sglang.srt.plugins``. Requests without an order of ours
(`disagg_core.engines.servers.wire`) pass through untouched. SGLang only logs a plugin that fails; with
``DRAFTLINE_CAPTURE_REQUIRED=1`` (servers that we start ourselves) the server does not start without capture, and
every server is probed before its first sample in any case.
"""

from __future__ import annotations

import inspect
import logging
import os
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from disagg_core.engines.servers.recorder import Recorder, Recording, WritableStore
from disagg_core.engines.servers.wire import SGLANG_VERSION, WIRE_KEY, ServerFacts, StoreAddress, decode_order
from disagg_core.errors import TargetError
from disagg_core.settings import get_settings
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import model_fingerprint

logger = logging.getLogger(__name__)

REQUIRED_VARIABLE = "DRAFTLINE_CAPTURE_REQUIRED"

_COMPONENTS = "sglang.srt.managers.scheduler_components"
_PREFILL = f"{_COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor._append_prefill_hidden_states"
_STREAM = f"{_COMPONENTS}.output_streamer.SchedulerOutputStreamer.stream_output"
_INGEST = "sglang.srt.managers.scheduler.Scheduler.ingest_requests"
_IDLE = "sglang.srt.managers.scheduler.Scheduler.maybe_sleep_on_idle"

_PARAMETERS = {
    _PREFILL: (
        "self",
        "req",
        "logits_output",
        "hidden_state_offset",
        "capture_hidden_mode",
        "extend_input_len",
        "store",
    ),
    _STREAM: ("self", "reqs", "return_logprob", "skip_req"),
    _INGEST: ("self", "stop_at_pause"),
    _IDLE: ("self",),
}
_RECORDING = "draftline_recording"
_IDLE_WAIT_S = 0.02
_FACTS: list[ServerFacts] = []


def register() -> None:
    """Register the hooks; called by SGLang in each of its processes.

    Raises:
        TargetError: this is not the SGLang that the hooks were written for.
        SystemExit: the same, where the server must not start without capture.
    """
    try:
        _check_sglang()
    except TargetError as error:
        if os.environ.get(REQUIRED_VARIABLE) == "1":
            raise SystemExit(f"draftline: {error}") from error
        raise
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_PREFILL, _collect_rows, HookType.AROUND)
    HookRegistry.register(_STREAM, _hold_replies, HookType.AROUND)
    HookRegistry.register(_INGEST, _release_replies, HookType.AFTER)
    HookRegistry.register(_IDLE, _wait_for_writer, HookType.AROUND)


def _check_sglang() -> None:
    found = version("sglang")
    if found != SGLANG_VERSION:
        raise TargetError(
            f"the capture plugin knows sglang {SGLANG_VERSION} only, found {found}; build the SGLang environment with "
            "infra/sglang/setup.sh"
        )
    for target, expected in _PARAMETERS.items():
        parameters = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        if parameters != expected:
            raise TargetError(f"expected {target}({', '.join(expected)}), found ({', '.join(parameters)})")


@cache
def _recorder() -> Recorder:
    return Recorder(_open_store)


def _open_store(address: StoreAddress) -> WritableStore:
    from disagg_core.store import MooncakeFeatureStore

    endpoints = StoreEndpoints(master_address=address.master_address, metrics_address=address.metrics_address)
    return MooncakeFeatureStore(
        endpoints,
        namespace=address.namespace,
        host=get_settings().host,
        protocol=address.protocol,
        checksum=address.checksum,
        put_timeout_s=address.put_timeout_s,
        staging_bytes=address.staging_bytes,
    )


# --- hooks -------------------------------------------------------------------------------------------------------


def _collect_rows(
    original: Callable[..., int],
    processor: Any,
    *,
    req: Any,
    logits_output: Any,
    hidden_state_offset: int,
    capture_hidden_mode: Any,
    extend_input_len: int,
    store: bool = True,
) -> int:
    """Take this chunk's rows of a request with an order; return the offset of the next request's rows."""
    recording = _recording_of(req)
    if recording is None:
        return original(
            processor,
            req=req,
            logits_output=logits_output,
            hidden_state_offset=hidden_state_offset,
            capture_hidden_mode=capture_hidden_mode,
            extend_input_len=extend_input_len,
            store=store,
        )
    full = capture_hidden_mode.is_full()
    end = hidden_state_offset + (extend_input_len if full else 1)
    if recording.handed_over or not _writes_samples():
        return end
    try:
        if (
            not full
            or logits_output.last_hidden_states is None
            or logits_output.hidden_states_token_indices is not None
        ):
            reason = "the server does not capture; start it with the flags in infra/sglang/README.md"
            _recorder().refuse(recording, reason, retryable=False)
        elif req.is_retracted or req.finished():
            _recorder().restart(recording)
        else:
            rows = slice(hidden_state_offset, end)
            _recorder().collect(
                recording, aux=logits_output.hidden_states[rows], last=logits_output.last_hidden_states[rows]
            )
            if store:
                _recorder().finish(recording, list(req.origin_input_ids), lambda: _facts(processor.model_config))
    except Exception as error:  # anything raised here would end SGLang's scheduler
        logger.exception("capture of request %s failed", req.rid)
        _recorder().refuse(recording, f"{type(error).__name__}: {error}", retryable=True)
    return end


def _hold_replies(
    original: Callable[..., None], streamer: Any, reqs: list[Any], return_logprob: bool, skip_req: Any = None
) -> None:
    """Let replies out except those whose sample is still on its way to the store."""
    ready = []
    for req in reqs:
        recording = None if req is skip_req else _recording_of(req)
        if recording is not None:
            if _is_aborted(req):
                _recorder().abandon(recording)
            if _recorder().hold(recording, req, streamer):
                continue
        ready.append(req)
    original(streamer, ready, return_logprob, skip_req)


def _release_replies(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    """Send the held replies whose samples are settled; runs in every turn of the scheduler's loop."""
    if not _recorder().holding:
        return
    for req, streamer in _recorder().released():
        streamer.stream_output([req], False)


def _wait_for_writer(original: Callable[..., None], scheduler: Any) -> None:
    """While replies are held, wait for the writer instead of sleeping or spinning."""
    if _recorder().holding:
        _recorder().wait(_IDLE_WAIT_S)
    else:
        original(scheduler)


# --- what is read of SGLang --------------------------------------------------------------------------------------


def _recording_of(req: Any) -> Recording | None:
    """Return the recording of a request with an order of ours, made when it is first asked for."""
    recording: Recording | None = req.__dict__.get(_RECORDING)
    if recording is not None:
        return recording
    text = (req.sampling_params.custom_params or {}).get(WIRE_KEY)
    if text is None:
        return None
    recording = Recording()
    setattr(req, _RECORDING, recording)
    try:
        recording.order = decode_order(text)
    except (msgspec.DecodeError, TypeError) as error:
        reason = f"the order cannot be read ({error}); are producer and server of the same draftline version?"
        _recorder().refuse(recording, reason, retryable=False)
    return recording


def _writes_samples() -> bool:
    """Tell whether this process is the tensor-parallel rank that has the whole states and answers requests."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return bool(parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0)


def _is_aborted(req: Any) -> bool:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason, FINISH_ABORT)


def _arguments() -> Any:
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.runtime_context import get_server_args

    return resolving_view(get_server_args())


def _facts(model_config: Any) -> ServerFacts:
    """Return what this server runs; read once, since a server serves one model for as long as it lives."""
    if not _FACTS:
        _FACTS.append(_read_facts(model_config))
    return _FACTS[0]


def _read_facts(model_config: Any) -> ServerFacts:
    arguments = _arguments()
    layers = arguments.return_aux_hidden_state_layer_ids
    return ServerFacts(
        sglang_version=version("sglang"),
        model_path=str(model_config.model_path),
        revision=model_config.revision,
        fingerprint=model_fingerprint(str(model_config.model_path), _revision(model_config)),
        model_type=model_config.hf_text_config.model_type,
        num_layers=model_config.num_hidden_layers,
        hidden_size=model_config.hidden_size,
        vocab_size=model_config.vocab_size,
        dtype=str(model_config.dtype).removeprefix("torch."),
        aux_layers=None if layers is None else list(layers),
        context_length=model_config.context_len,
        tensor_parallel=arguments.tp_size,
        settings={
            "radix_cache_disabled": bool(arguments.disable_radix_cache),
            "prefill_cuda_graph_disabled": arguments.cuda_graph_config.prefill.backend == "disabled",
        },
    )


def _revision(model_config: Any) -> str | None:
    """Return the commit of a hub model's config, which a run is pinned to; otherwise the revision asked for."""
    commit: str | None = getattr(model_config.hf_config, "_commit_hash", None)
    asked_for: str | None = model_config.revision
    return commit or asked_for

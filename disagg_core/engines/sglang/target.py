"""`SGLangTarget`: the target run by SGLang servers, those of this run or external ones."""

from __future__ import annotations

from typing import Any

from disagg_core.contracts import PromptTask
from disagg_core.engines.generation import Sampling
from disagg_core.engines.servers.pool import PoolMember
from disagg_core.engines.servers.process import ManagedServer
from disagg_core.engines.servers.target import ServedTarget
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.engines.sglang.launch import ServerLaunch, find_sglang_python
from disagg_core.run_spec.document import TargetSection


class SGLangTarget(ServedTarget):
    """A target over SGLang servers; arguments and promises are those of `ServedTarget`.

    The section's `server_urls` name external servers, otherwise `servers` are started here.
    """

    def _members(self) -> list[PoolMember]:
        section, timeout_s = self._section, self._section.request_timeout_s
        if section.server_urls:
            return [PoolMember(SglangClient(url, url, timeout_s=timeout_s)) for url in section.server_urls]
        launch = ServerLaunch(
            python=find_sglang_python(self._settings),
            section=section,
            facts=self._facts,
            capture=self._wanted,
            longest=min(self._max_tokens, self._facts.max_position_embeddings),
            cpu=_without_gpu(section),
            host=self._settings.host,
            seed=self._seed,
            sampled=self._sampling is not None and self._sampling.temperature > 0,
        )
        servers = [ManagedServer(launch, index=index, log_dir=self._log_dir) for index in range(section.servers)]
        return [
            PoolMember(SglangClient(server.name, server.url, timeout_s=timeout_s), managed=server) for server in servers
        ]

    def _sampling_parameters(self, task: PromptTask, sampling: Sampling) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_new_tokens": sampling.room(task),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(self._facts.eos_token_ids),
        }
        if sampling.temperature > 0:
            parameters["sampling_seed"] = sampling.seed_for(task.ordinal) % 2**31
        return parameters


def _without_gpu(section: TargetSection) -> bool:
    if section.device != "auto":
        return section.device == "cpu"
    import torch

    return not torch.cuda.is_available()

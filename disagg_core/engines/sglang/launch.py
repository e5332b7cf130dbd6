"""SGLang servers that we start ourselves: the environment that they run in, their command line and variables."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from disagg_core.contracts import Capture
from disagg_core.engines.servers.wire import SGLANG_VERSION
from disagg_core.errors import MissingLibrary
from disagg_core.processes.tree import free_ports
from disagg_core.run_spec.document import TargetSection
from disagg_core.settings import CHECKOUT, Settings
from disagg_core.target.facts import TargetFacts

_CONTEXT_ROOM = 2
_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph", "--skip-server-warmup"),
)


@dataclass(frozen=True)
class ServerLaunch:
    """Everything that decides how a server is started, but for its place among several (port, GPUs, log)."""

    python: Path
    section: TargetSection
    facts: TargetFacts
    capture: Capture
    longest: int
    cpu: bool
    host: str
    seed: int = 0
    sampled: bool = False

    @property
    def engine(self) -> str:
        """What its servers are called."""
        return "sglang"

    @property
    def gpus(self) -> int:
        """GPUs of one server."""
        return self.section.tensor_parallel

    def command(self, *, port: int, base_gpu: int) -> list[str]:
        """Return the command line of one server; the run's `target.server_args` come last and so win."""
        facts, section = self.facts, self.section
        command = [str(self.python), "-m", "sglang.launch_server"]
        command += ["--model-path", str(Path(facts.model).expanduser()) if _is_directory(facts.model) else facts.model]
        command += ["--host", self.host, "--port", str(port), "--dtype", facts.dtype]
        command += ["--tp", str(section.tensor_parallel), "--random-seed", str(self.seed)]
        # The algorithm only names SGLang's way of counting layers; no draft is loaded.
        command += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
        command += ["--return-aux-hidden-state-layer-ids", *(str(layer) for layer in self.capture.layers)]
        command += ["--disable-radix-cache", "--chunked-prefill-size", "-1", "--sleep-on-idle"]
        if section.revision is not None:
            command += ["--revision", section.revision]
        if section.trust_remote_code:
            command += ["--trust-remote-code"]
        if self._needs_room:
            command += ["--context-length", str(self.longest + _CONTEXT_ROOM)]
        if self.cpu:
            tokens = max(4096, 2 * (self.longest + _CONTEXT_ROOM))
            # SGLang works its share of the memory out for GPUs and arrives below zero here.
            command += [*_CPU_FLAGS, "--max-total-tokens", str(tokens), "--mem-fraction-static", "0.8"]
        else:
            # The outputs of a captured prefill graph are overwritten by the next batch while we still read them.
            command += ["--disable-prefill-cuda-graph", "--base-gpu-id", str(base_gpu)]
            # SGLang's own choice is one for all servers that start at the same time.
            command += ["--nccl-port", str(_another_port(port))]
            if self.sampled:
                # Only so does SGLang heed the seed of a request. It has no such mode on a CPU.
                command += ["--enable-deterministic-inference"]
        return [*command, *section.server_args]

    def environment(self) -> dict[str, str]:
        """Return the variables of a server's process besides ours."""
        from disagg_core.engines.sglang.plugin import REQUIRED_VARIABLE

        variables = {
            REQUIRED_VARIABLE: "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",  # what lies in the directory we were started in is none of the server's business
            "DRAFTLINE_HOST": self.host,
        }
        if self._needs_room:
            variables["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
        if self.cpu:
            variables["SGLANG_USE_CPU_ENGINE"] = "1"
            cores = sorted(os.sched_getaffinity(0))
            ranks = range(self.section.tensor_parallel)
            if len(ranks) > 1:
                variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in ranks)
        return variables

    @property
    def _needs_room(self) -> bool:
        """SGLang wants a prompt shorter than the context by two: one token is generated and thrown away."""
        return self.longest + _CONTEXT_ROOM > self.facts.max_position_embeddings


def _another_port(taken: int) -> int:
    """Return a free port for the ranks of one server, which meet on loopback."""
    return next(port for port in free_ports("127.0.0.1", 2) if port != taken)


def find_sglang_python(settings: Settings, checkout: Path = CHECKOUT) -> Path:
    """Return the Python of the SGLang environment.

    Raises:
        MissingLibrary: there is none, or it has no sglang of the right version; the message says how to build it.
    """
    python = settings.sglang_python or checkout / ".venv-sglang" / "bin" / "python"
    advice = "build it with `bash infra/sglang/setup.sh --cuda` (--cpu for tests), or set DRAFTLINE_SGLANG_PYTHON"
    if not python.is_file():
        raise MissingLibrary(f"the SGLang environment: expected a Python at {python}, found none; {advice}")
    found = _sglang_version(python)
    if found != SGLANG_VERSION:
        raise MissingLibrary(f"{python}: expected sglang {SGLANG_VERSION}, found {found or 'none'}; {advice}")
    return python


def _sglang_version(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.strip()


def _is_directory(model: str) -> bool:
    return Path(model).expanduser().is_dir()

"""A producer or consumer of the soak test: two threads, commands on stdin, one line on stdout for each sample done."""

import queue
import random
import sys
import threading
from collections.abc import Mapping

import msgspec
import torch

from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.endpoints import StoreEndpoints

THREADS = 2
SMALLEST = 10_000


def sample_of(ordinal: int, largest: int) -> dict[str, torch.Tensor]:
    """The tensors of a sample: 10 KB to `largest` bytes, log-uniform, the same in every process."""
    nbytes = int(SMALLEST * (largest / SMALLEST) ** random.Random(ordinal).random())
    bits = torch.empty(nbytes // 8, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(ordinal))
    cut = bits.numel() // 4
    return {"input_ids": bits[:cut].view(torch.int32), "aux_hidden_states": bits[cut:].view(torch.int16)}


def main() -> None:
    torch.set_num_threads(1)
    role, endpoints_json, identity_json, largest = sys.argv[1:]
    identity = msgspec.json.decode(identity_json, type=RunIdentity)
    namespace = f"{identity.run_id}/{identity.attempt}"
    printing = threading.Lock()
    commands: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def say(line: str) -> None:
        with printing:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def produce(store: MooncakeFeatureStore, command: str) -> None:
        tensors: Mapping[str, torch.Tensor] = sample_of(int(command), int(largest))
        if int(command) % 2:  # every other sample is written where it will be sent from
            places = store.allocate({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
            for name, tensor in tensors.items():
                places[name].copy_(tensor)
            tensors = places
        ref = store.put(command, tensors, identity=identity, source_task_id=command, num_tokens=1)
        say(msgspec.json.encode(ref).decode())

    def consume(store: MooncakeFeatureStore, command: str) -> None:
        ref = msgspec.json.decode(command, type=SampleRef)
        found, expected = store.get(ref), sample_of(int(ref.sample_id), int(largest))
        exact = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        say(f"{ref.sample_id} {'exact' if exact else 'wrong'}")

    def work(store: MooncakeFeatureStore) -> None:
        while (command := commands.get()) is not None:
            (produce if role == "produce" else consume)(store, command)

    endpoints = StoreEndpoints.model_validate_json(endpoints_json)
    with MooncakeFeatureStore(endpoints, namespace=namespace, put_timeout_s=120, staging_bytes=16 << 20) as store:
        threads = [threading.Thread(target=work, args=(store,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            commands.put(line.strip())
        for _ in threads:
            commands.put(None)
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()

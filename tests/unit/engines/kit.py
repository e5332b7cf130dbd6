"""What the tests of the SGLang side have in common: the identity of a run, and a store's address."""

from disagg_core.contracts import RunIdentity
from disagg_core.engines.servers.wire import StoreAddress

IDENTITY = RunIdentity(
    run_id="run",
    attempt=1,
    strategy="eagle3",
    target_model_version="v",
    tokenizer_version="k",
    vocab_map_version="m",
    draft_weight_version=0,
    aux_layers=(0, 2, 4),
    dtype="float32",
)
ADDRESS = StoreAddress(
    master_address="h:1", metrics_address="h:2", namespace="run/1", protocol="tcp", checksum=True, put_timeout_s=5.0
)

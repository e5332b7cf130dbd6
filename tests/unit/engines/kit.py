"""What the tests of the SGLang side have in common: what is captured, the identity of a run, and a store's address."""

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.engines.servers.wire import StoreAddress

CAPTURE = Capture((0, 2, 4), last_hidden_state=True)
IDENTITY = RunIdentity(
    run_id="run",
    attempt=1,
    strategy="eagle3",
    target_model_version="v",
    tokenizer_version="k",
    vocab_map_version="m",
    draft_weight_version=0,
    capture=CAPTURE,
    dtype="float32",
)
ADDRESS = StoreAddress(
    master_address="h:1", metrics_address="h:2", namespace="run/1", protocol="tcp", checksum=True, put_timeout_s=5.0
)

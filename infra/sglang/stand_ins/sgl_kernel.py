"""Stand-in for SGLang's compiled kernels on a machine without a GPU: the names exist, and calling one fails.

SGLang imports these names when it runs on a CPU. Dense Llama and Qwen models in its plain torch code never call them.
"""

from typing import Any, NoReturn


def _absent(name: str) -> Any:
    def call(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this SGLang environment was built without kernels (setup.sh --cpu); "
            "use a dense Llama or Qwen model, or build the environment with --cuda on a machine with a GPU"
        )

    call.__name__ = call.__qualname__ = name
    return call


assign_draft_cache_locs_contiguous_cpu = _absent("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _absent("assign_extend_cache_locs_cpu")
assign_req_to_token_pool_cpu = _absent("assign_req_to_token_pool_cpu")
build_tree_kernel_efficient_cpu = _absent("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _absent("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _absent("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _absent("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = _absent("rotate_input_ids_cpu")
verify_tree_greedy_cpu = _absent("verify_tree_greedy_cpu")

"""Every name of SGLang that this project hangs on, what it looks like there, and what it is for. Data only.

`sgl_lmcache/seams.py` compares it with the installed SGLang; a test compares it with our own sources, in both
directions: an import, an override or an attribute that is not here fails it, and so does a row that nothing uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

_NAMESPACES = ("context", "device", "disagg", "exec", "lora", "memory", "parallel", "schedule", "serving", "spec")
_NAMESPACE = "part of the namespace"
_REFUSALS = "read by our refusals"
_RECORDING = "needed by a recording"
_PREFETCH = (
    "self, request, last_host_node_id, new_input_tokens, last_hash=None, prefix_keys=None, matched_prefix_tokens=None, "
    "extra_key=None, cache_salt=None, storage_hit_end=None"
)


@dataclass(frozen=True, slots=True)
class Seam:
    """One name. `use`: a few words that end a sentence about it.

    shape: a function's parameters as in its source but without annotations, or the fields, in order, of a class that
    we construct. None: only the name matters, and it is no function. mentions: what the body of SGLang's function
    calls on our side of the seam; its own parameters do not matter then.
    """

    path: str
    shape: str | None
    use: str
    mentions: tuple[str, ...] = ()


def _of(owner: str, *seams: Seam) -> Iterator[Seam]:
    """Seams whose paths are given below a module or a class."""
    return (replace(seam, path=f"{owner}.{seam.path}") for seam in seams)


def _names(owner: str, use: str, *names: str) -> Iterator[Seam]:
    """Names of one owner that serve one purpose, and whose shape does not matter."""
    return (Seam(f"{owner}.{name}", None, use) for name in names)


def _caller(path: str, *mentions: str) -> Seam:
    """A function of SGLang's that has to go on calling us."""
    return Seam(path, None, f"calls our {' and '.join(mentions)}", mentions)


_PLUGIN = (
    *_names("sglang.srt.plugins", "the group of our entry point", "GENERAL_PLUGINS_GROUP"),
    *_names("sglang.srt.plugins.hook_registry", "registers our hooks", "HookRegistry", "HookType"),
    *_names("sglang.srt.plugins.hook_registry.HookType", "a kind of our hooks", "BEFORE", "REPLACE"),
    Seam(
        "sglang.srt.plugins.hook_registry.HookRegistry.register",
        "cls, target, hook, hook_type=HookType.AFTER, *, source=None",
        "registers our hooks",
    ),
    Seam("sglang.srt.server_args.ServerArgs", None, "given to our hooks"),
    Seam("sglang.srt.server_args.ServerArgs.resolve_once", "self", "hooked to choose the page size"),
    Seam("sglang.srt.server_args.ServerArgs._resolution_finished", None, "tells whether the hook comes too late"),
    Seam("sglang.srt.managers.scheduler.Scheduler", None, "hooked to turn its external-cache calls on"),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        None,
        "reads the flags that our hook turns on",
        ("enable_lmcache", "enable_unified_cache_external_linker"),
    ),
    *_of(
        "sglang.srt.mem_cache.registry",
        Seam("register_radix_cache_backend", "name, factory", "registers our backend"),
        Seam("create_unified_radix_cache", "ctx, *, cache_class=None", "builds our cache"),
        Seam("default_radix_cache_factory", "ctx", "builds the plain cache where radix caching is off"),
        Seam("TreeCacheBuildContext", None, "given to our factory"),
    ),
)

_CONFIGURATION = (
    *_of(
        "sglang.srt.runtime_context",
        *(Seam(f"get_{name}", "", "reads the published configuration") for name in _NAMESPACES),
        Seam("RuntimeContext.override", "self, source, **fields", "turns the external-cache flags on"),
    ),
    *_names(
        "sglang.srt.mem_cache.registry.TreeCacheBuildContext",
        "read by our factory and refusals",
        *("server_args", "params", "is_hybrid_swa", "is_hybrid_ssm", "disable_radix_cache", "tp_worker", "tp_group"),
        "model_config",
    ),
    Seam("sglang.srt.mem_cache.cache_init_params.CacheInitParams", None, "given to our cache's constructor"),
    *_names(
        "sglang.srt.mem_cache.cache_init_params.CacheInitParams",
        "read by our factory and refusals",
        *("page_size", "pp_size", "attn_cp_size", "token_to_kv_pool_allocator"),
        *("mtp_draft_device_pools", "attn_tp_cache_group", "is_eagle", "enable_metrics"),
    ),
    *_names(
        "sglang.srt.arg_groups.fields.memory.Memory",
        "a flag that we read or turn on",
        *("radix_cache_backend", "disable_radix_cache", "enable_session_radix_cache", "enable_lmcache"),
        *("enable_unified_cache_external_linker", "enable_flexkv", "enable_hierarchical_cache", "enable_hisparse"),
        *("enable_unified_memory", "hicache_storage_backend"),
    ),
    *_names("sglang.srt.arg_groups.fields.parallel.Parallel", "counts the ranks", "tp_size", "dp_size", "nnodes"),
    *_names("sglang.srt.arg_groups.fields.parallel.Parallel", _NAMESPACE, "attn_tp_rank", "attn_tp_size"),
    *_names("sglang.srt.arg_groups.fields.parallel.Parallel", _RECORDING, "attn_dp_size"),
    *_names("sglang.srt.runtime_context.SpawnRanks", "numbers the ranks of a node", "dp_rank"),
    *_names("sglang.srt.mem_cache.registry.TreeCacheBuildContext", "numbers the ranks of a node", "tp_rank"),
    *_names("sglang.srt.arg_groups.fields.parallel.Parallel", _REFUSALS, "dcp_size"),
    *_names("sglang.srt.arg_groups.fields.schedule.Schedule", "spoils what a prefill takes", "enable_mixed_chunk"),
    *_names("sglang.srt.arg_groups.fields.lora.Lora", _NAMESPACE, "lora_paths"),
    *_names("sglang.srt.lora.lora_registry.LoRARef", _NAMESPACE, "lora_path"),
    *_names(
        "sglang.srt.arg_groups.fields.model.Model", _NAMESPACE, "load_format", "model_path", "revision", "quantization"
    ),
    *_names("sglang.srt.configs.model_config.ModelConfig", _NAMESPACE, "hf_config"),
    *_names("sglang.srt.layers.radix_attention.RadixAttention", _NAMESPACE, "k_scale_float", "v_scale_float"),
    *_names("sglang.srt.model_executor.model_runner.ModelRunner", _NAMESPACE, "model"),
    *_names("sglang.srt.distributed.parallel_state.GroupCoordinator", "lets ranks agree", "cpu_group"),
    *_names("sglang.srt.arg_groups.fields.spec.Spec", _REFUSALS, "speculative_algorithm"),
    *_names("sglang.srt.arg_groups.fields.disagg.Disagg", _REFUSALS, "disaggregation_mode", "enable_pdmux"),
    *_names("sglang.srt.arg_groups.fields.serving.Serving", _REFUSALS, "enable_streaming_session"),
    *_names("sglang.srt.arg_groups.fields.exec_.ExecDllm", _REFUSALS, "dllm_algorithm"),
    *_names("sglang.srt.arg_groups.fields.exec_.ExecMoe", _REFUSALS, "elastic_ep_backend"),
    *_names("sglang.srt.arg_groups.fields.device.Device", _REFUSALS, "device"),
    *_names("sglang.srt.arg_groups.fields.schedule.Schedule", "the page size, if one is given", "page_size"),
    *_names("sglang.srt.arg_groups.fields.model.Model", "sizes a page", "kv_cache_dtype"),
    Seam("sglang.srt.configs.model_config.ModelConfig", None, "sizes a page"),
    *_names(
        "sglang.srt.configs.model_config.ModelConfig",
        "sizes a page",
        *("attention_arch", "kv_lora_rank", "qk_rope_head_dim", "head_dim", "v_head_dim", "num_hidden_layers", "dtype"),
    ),
    *_of(
        "sglang.srt.configs.model_config.ModelConfig",
        Seam(
            "from_server_args",
            "server_args, model_path=None, model_revision=None, is_draft_model=False, context_length=None, **kwargs",
            "reads the model's sizes before SGLang does",
        ),
        Seam("get_num_kv_heads", "self, tensor_parallel_size, dcp_size=1", "sizes a page"),
    ),
)

_CACHE = (
    *_names("sglang.srt.mem_cache.base_prefix_cache", "a type of the calls to our cache", "BasePrefixCache"),
    *_names("sglang.srt.mem_cache.base_prefix_cache", "a type of the calls to our cache", "CacheRequestHandle"),
    *_names("sglang.srt.mem_cache.base_prefix_cache", "a type of the calls to our cache", "EvictParams", "EvictResult"),
    Seam("sglang.srt.mem_cache.base_prefix_cache.CacheRequestHandle.rid", None, "names the request"),
    Seam("sglang.srt.mem_cache.base_prefix_cache.EvictParams.num_tokens", None, "says how much room SGLang needs"),
    Seam("sglang.srt.managers.schedule_batch.Req", None, "a request"),
    Seam("sglang.srt.managers.schedule_batch.Req.rid", None, "names the request"),
    Seam(
        "sglang.srt.managers.schedule_batch.Req.__init__",
        None,
        "hooked to tell adapters' keys from callers'",
        ("extra_key", "lora_id"),
    ),
    *_names("sglang.srt.managers.schedule_batch.Req", "tells adapters' keys from callers'", "extra_key", "lora_id"),
    Seam("sglang.srt.managers.schedule_batch.Req.skip_radix_cache_insert", None, "says that nobody will hit it"),
    *_of(
        "sglang.srt.managers.schedule_batch.Req",
        Seam("origin_input_ids", None, _RECORDING),
        Seam("cache_salt", None, _RECORDING),
        Seam("last_node", None, _RECORDING),
        Seam("positional_embed_overrides", None, _RECORDING),
        Seam("output_ids_through_stop", "self", _RECORDING),
        Seam("finished", "self", "tells a request's end from its retraction"),
    ),
    *_names(
        "sglang.srt.managers.schedule_batch.Req",
        "says where a prompt was found, for metrics",
        *("cached_tokens_device", "cached_tokens_host", "cached_tokens_storage", "retracted_stain"),
    ),
    Seam("sglang.srt.constants.HEALTH_CHECK_RID_PREFIX", None, "tells SGLang's own requests from others'"),
    Seam(
        "sglang.srt.mem_cache.utils.get_storage_hash_str",
        "key, prior_hash=None, page_size=None",
        "hashes what a match leaves out, for a recording",
    ),
    Seam("sglang.srt.mem_cache.unified_cache.cache_action.BackupKV", None, "a type of the calls to our cache"),
    Seam("sglang.srt.mem_cache.unified_cache.components.ComponentType", None, "a type of the calls to our cache"),
    Seam("sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.NodeId", None, "names a node"),
    Seam("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache", None, "the class that our cache extends"),
    *_of(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache",
        Seam("__init__", "self, params", "overridden: tickets exist before SGLang's first reset"),
        Seam("init_cache_linker", "self, cache_linker", "overridden: attaches our wrapper"),
        Seam("is_backuped", "self, node_id", "overridden: every request is told to us"),
        Seam("prefetch_from_storage", _PREFETCH, "overridden: opens a request's ticket"),
        Seam("check_prefetch_progress", "self, request", "overridden: the ticket's verdict"),
        Seam("pop_prefetch_loaded_span", "self, request", "overridden: what came from below host memory"),
        Seam("checkpoint", "self, req, *, up_to, **kwargs", "overridden: the end of a prefill"),
        Seam("check_hicache_events", "self", "overridden: our work of each scheduler iteration"),
        Seam("ready_to_load_host_cache", "self", "overridden: starts a batch's restores"),
        Seam("finish_external_linker_loads", "self, reqs", "overridden: a batch's tickets have served"),
        Seam("on_release", "self, req, *, checkpointed", "overridden: a request's end"),
        Seam("release_aborted_request", "self, request", "overridden: an aborted request's end"),
        Seam("release_host_resources", "self", "overridden: the server's end"),
        Seam("evict", "self, params", "overridden: unlocks write-backs first"),
        Seam("evict_for_alloc", "self, params, *, allocation_reclaim_satisfied=None", "overridden: as evict"),
        Seam("_evict_device_leaf", "self, node_id, tracker", "overridden: tells the index what HBM loses"),
        Seam("clear_storage_backend", "self", "overridden: empties the tier below host memory"),
        Seam("reset", "self", "overridden: closes all tickets"),
        Seam("evictable_size", "self", "tells whether write-backs must be unlocked"),
        Seam("protected_size", "self", "tells whether HBM is empty"),
        Seam("token_to_kv_pool_allocator", None, "says how much HBM holds"),
        Seam("get_last_hash_value", "self, node_id", "the key that a tail hangs from"),
        Seam("inc_lock_ref", "self, node_id, skip_lock_components=()", "locks a node for its write-back"),
        Seam("tree_core", None, "the tree, whose nodes we read"),
        Seam("linker", None, "where our wrapper is attached"),
        Seam("page_size", None, "tokens a page"),
    ),
    Seam(
        "sglang.srt.mem_cache.cpp_utils.native_hash.get_native_hash",
        "token_ids, prior_digest, page_size=None",
        "compiled at the start",
    ),
)

_TREE_CORE_METHODS = (
    Seam("is_eagle", None, "tells which form keys have"),
    Seam("collect_path_info", "self, end_node_ids", "the path of a node that is written back"),
    Seam("get_last_hash_value", "self, node_id", "the parent of a node that is written back"),
    Seam("get_prefix_hash_values", "self, node_id", "the keys of a path that is written back again"),
    Seam("get_hash_values", "self, node_id", "the keys of a node that HBM evicts"),
    Seam("finish_external_linker_offload", "self, node_ids, ack_id, success", "marks a node that needs no copy"),
    Seam("collect_full_device_indices", "self, from_node_id, until_node_id", "where a path lies in HBM"),
    Seam("mark_external_linker_offload_pending", "self, node_id", "marks a node as being written back"),
)
_LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker"

_WRAPPER = (
    Seam("sglang.srt.mem_cache.hicache_storage.PoolTransfer", None, "names pages and their places in HBM"),
    *_names(
        "sglang.srt.mem_cache.hicache_storage.PoolTransfer", "names pages and their places", "keys", "device_indices"
    ),
    *_names("sglang.srt.mem_cache.hicache_storage", "names the one pool that we serve", "PoolName", "PoolName.KV"),
    Seam("sglang.srt.mem_cache.radix_cache.RadixKey", None, "a prompt's tokens"),
    Seam(
        "sglang.srt.mem_cache.radix_cache.RadixKey.__init__",
        "self, token_ids, extra_key=None, is_bigram=False, limit=None, cache_salt=None",
        "tokens that a match leaves out, for a recording",
    ),
    Seam("sglang.srt.mem_cache.radix_cache.RadixKey.maybe_to_bigram_view", "self, is_eagle, value=None", "as the tree"),
    Seam("sglang.srt.mem_cache.base_prefix_cache.MatchResult", None, "what a match found"),
    *_names(
        "sglang.srt.mem_cache.base_prefix_cache.MatchResult",
        "what a match found",
        *("device_prefix_len", "last_device_node", "last_host_node", "best_match_node", "host_hit_length"),
    ),
    Seam("sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.TreePathNodeInfo.parent_id", None, "a path"),
    Seam("sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.TreePathNodeInfo.path_end", None, "a path"),
    Seam("sglang.srt.mem_cache.base_prefix_cache.IncLockRefResult.to_dec_params", "self", "how to unlock a node"),
    *_of("sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore", *_TREE_CORE_METHODS),
    *_of("sglang.srt.mem_cache.rust_tree_core.adapter.RustUnifiedTreeCore", *_TREE_CORE_METHODS),
    *_of(
        _LINKER,
        Seam("ExternalCacheHitMarker", "tail_hashes, device_hit_len", "what we tell load_back"),
        Seam("_PendingOffload", "lock_node_id, lock_params, publish_node_ids", "a node that is being written back"),
        Seam("UnifiedCacheLinkerWrapper", None, "the class that our wrapper extends"),
    ),
    *_of(
        f"{_LINKER}.UnifiedCacheLinkerWrapper",
        Seam("__init__", "self, cache, cache_linker", "overridden: keeps the tails of waiting requests"),
        Seam("match", "self, key, req, result", "overridden: adds what host memory has"),
        Seam("_offload_node", "self, node_id, transfers", "overridden: writes pages back below their parent"),
        Seam("reset", "self", "overridden: forgets all tails"),
        Seam("_tail_hashes", "self, key, result, device_hit_len", "hashes what a prompt lacks in HBM"),
        Seam("start_layer_wise_loading", "self", "starts a batch's restores"),
        Seam("commit_completed_offloads", "self, successes", "unlocks what has been written back"),
    ),
    *_names(
        f"{_LINKER}.UnifiedCacheLinkerWrapper",
        "shared with our wrapper",
        *("cache", "cache_linker", "hit_markers", "pending_offloads"),
    ),
)

_LINKER_CALLS = (
    # Our linker and our layer counter extend nothing: they stand in the place of these.
    *_of(
        f"{_LINKER}.UnifiedCacheLinker",
        Seam("load", "self, rid, transfers", "what our linker stands in for"),
        Seam("start_layer_wise_loading", "self", "what our linker stands in for"),
        Seam("finish_layer_wise_loading", "self, counter_index", "what our linker stands in for"),
        Seam("cancel_queued_load", "self, rid", "what our linker stands in for"),
        Seam("reset", "self", "what our linker stands in for"),
        Seam("close", "self", "what our linker stands in for"),
        Seam("layer_done_counter", None, "what our linker stands in for"),
        Seam("pools", None, "what our linker stands in for"),
    ),
    *_of(
        f"{_LINKER}.LayerWiseLoadCounter",
        Seam("set_consumer", "self, index", "what our layer counter stands in for"),
        Seam("wait_until", "self, threshold", "what our layer counter stands in for"),
        Seam("reset", "self", "what our layer counter stands in for"),
        Seam("consumer_index", None, "what our layer counter stands in for"),
        Seam("num_layers", None, "what our layer counter stands in for"),
    ),
)

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"

_CALLERS = (
    _caller(f"{_SCHEDULER}._prefetch_kvcache", "is_backuped", "prefetch_from_storage"),
    _caller(f"{_SCHEDULER}._process_hicache_events", "check_hicache_events"),
    _caller(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        *("check_prefetch_progress", "pop_prefetch_loaded_span", "ready_to_load_host_cache"),
    ),
    _caller(f"{_SCHEDULER}.run_batch", "finish_external_linker_loads"),
    _caller(f"{_SCHEDULER}.is_fully_idle", "has_pending_cache_operations"),
    _caller(f"{_SCHEDULER}.release_host_resources", "release_host_resources"),
    _caller("sglang.srt.mem_cache.common.release_kv_cache", "on_release"),
    _caller("sglang.srt.managers.tp_worker.TpModelWorker.set_hicache_consumer", "set_consumer"),
    _caller("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_key_buffer", "wait_until"),
    _caller("sglang.srt.mem_cache.memory_pool.MLATokenToKVPool.get_key_buffer", "wait_until"),
    _caller(f"{_LINKER}.UnifiedCacheLinkerWrapper.load_back", "hit_markers", "load"),
    _caller(f"{_LINKER}.UnifiedCacheLinkerWrapper.finish_loads", "finish_layer_wise_loading"),
    _caller(f"{_LINKER}.UnifiedCacheLinkerWrapper.release_request", "cancel_queued_load"),
    _caller(f"{_LINKER}.UnifiedCacheLinkerWrapper.close", "close"),
)

_POOLS = "sglang.srt.mem_cache.memory_pool"
_KERNELS = "sglang.kernels.ops.kvcache.hicache"

_BYTES = (
    *_names(_POOLS, "a pool that we copy", "MHATokenToKVPool", "MLATokenToKVPool"),
    *_names(
        f"{_POOLS}.MHATokenToKVPool",
        "describes the pool",
        *("kv_cache_layout", "k_buffer", "v_buffer", "layer_num", "head_num", "head_dim", "v_head_dim", "store_dtype"),
    ),
    *_names(
        f"{_POOLS}.MLATokenToKVPool", "describes the pool", "kv_buffer", "layer_num", "kv_cache_dim", "store_dtype"
    ),
    *(
        Seam(f"{_POOLS}.{pool}.register_layer_transfer_counter", "self, layer_transfer_counter", "lets the pool wait")
        for pool in ("MHATokenToKVPool", "MLATokenToKVPool")
    ),
    Seam("sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.get_kvcache", "self", "the pool"),
    Seam("sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.size", None, "says how much HBM holds"),
    *_of(
        "sglang.srt.managers.tp_worker.TpModelWorker",
        Seam("register_hicache_layer_transfer_counter", "self, counter", "lets the worker name a batch's restore"),
        Seam("model_runner", None, "leads to the forward's stream"),
    ),
    Seam("sglang.srt.model_executor.model_runner.ModelRunner.forward_stream", None, "the stream that copies wait for"),
    *_of(
        _KERNELS,
        Seam(
            "transfer_hicache_all_layer_staged_lf_page_unified",
            "k_ptr_src, v_ptr_src, src_pages, dst_pages, staging, dst",
            "copies pages to the host",
        ),
        Seam(
            "transfer_hicache_all_layer_mla_staged_lf_page_unified",
            "ptr_src, src_pages, dst_pages, staging, dst",
            "copies pages to the host",
        ),
        Seam(
            "transfer_hicache_one_layer_page_unified_lf",
            "k_cache_dst, v_cache_dst, src, src_indices, dst_indices, layer_id, *, block_quota=None",
            "copies a layer to HBM",
        ),
        Seam(
            "transfer_hicache_one_layer_mla_page_unified_lf",
            "cache_dst, src, src_indices, dst_indices, layer_id, *, block_quota=None",
            "copies a layer to HBM",
        ),
    ),
    Seam("sglang.kernels.ops.kvcache.hicache", None, "the kernels between HBM and pinned memory"),
)

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

_WEIGHTS = (
    Seam(_UPDATER, None, "hooked to notice new weights"),
    *(
        Seam(f"{_UPDATER}.{name}", "self, recv_req", "hooked to notice new weights")
        for name in (
            *("update_weights_from_disk", "update_weights_from_ipc", "check_weights"),
            *("begin_weight_update", "end_weight_update"),
            *("release_memory_occupation", "resume_memory_occupation"),
        )
    ),
    *_names(_UPDATER, "tells whether requests hold KV, and leads to our cache", "is_fully_idle", "scheduler"),
    *_names(_UPDATER, "tells whether the weights have memory", "offload_tags", "memory_saver_adapter"),
    *_names(_UPDATER, "tells whether a session is open", "_session"),
    *_names("sglang.srt.constants", "the tag of the weights' memory", "GPU_MEMORY_TYPE_WEIGHTS"),
    *_names(
        "sglang.srt.utils.torch_memory_saver_adapter.TorchMemorySaverAdapter",
        "tells whether memory can be released",
        "enabled",
    ),
    *_names(f"{_SCHEDULER}", "leads to our cache", "tree_cache"),
    *_names("sglang.srt.plugins.hook_registry.HookType", "a kind of our hooks", "AFTER"),
    Seam("sglang.srt.managers.io_struct.CheckWeightsReqInput", None, "given to our hook"),
    *_names("sglang.srt.managers.io_struct.CheckWeightsReqInput", "says whether weights change", "action"),
    *_names("sglang.srt.managers.io_struct.EndWeightUpdateReqOutput", "says whether a session has ended", "success"),
)

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

_ENDPOINTS = (
    *_names("sglang.srt.plugins.hook_registry.HookType", "a kind of our hooks", "AROUND"),
    Seam("sglang.srt.server_args.ServerArgs.check_server_args", "self", "hooked to add our endpoints before it serves"),
    *_names("sglang.srt.entrypoints", "the HTTP server that our endpoints are added to", "http_server"),
    *_names("sglang.srt.entrypoints.http_server", "where our endpoints are added", "app"),
    *_names(
        "sglang.srt.arg_groups.fields.serving.Serving",
        "decides where our endpoints are added",
        "tokenizer_worker_num",
        "admin_api_key",
    ),
    *_names("sglang.srt.environ", "names the application of several HTTP processes", "envs"),
    *_names(
        "sglang.srt.environ.Envs", "names the application of several HTTP processes", "SGLANG_HTTP_SERVER_APP_PATH"
    ),
    Seam("sglang.srt.entrypoints.http_server.get_global_state", "", "leads to the tokenizer manager"),
    *_names("sglang.srt.entrypoints.http_server._GlobalState", "leads to the schedulers", "tokenizer_manager"),
    *_names("sglang.srt.utils.auth", "asks for the admin key", "AuthLevel"),
    *_names("sglang.srt.utils.auth.AuthLevel", "asks for the admin key", "ADMIN_OPTIONAL"),
    Seam("sglang.srt.utils.auth.auth_level", "level", "asks for the admin key"),
    Seam(f"{_SCHEDULER}.get_internal_state", "self, recv_req", "hooked to answer questions about the cache"),
    *_names("sglang.srt.managers.io_struct", "carries a question to the schedulers", "GetInternalStateReq"),
    *_names("sglang.srt.managers.io_struct.BaseReq", "carries a question to the schedulers", "rid"),
    Seam("sglang.srt.managers.io_struct.GetInternalStateReqOutput", "internal_state", "carries an answer back"),
    *_names("sglang.srt.managers.io_struct.GetInternalStateReqOutput", "carries an answer back", "internal_state"),
    *_names("sglang.srt.managers.tokenizer_manager", "leads to the schedulers", "TokenizerManager"),
    Seam(f"{_MANAGER}.is_ready", "self", "whether SGLang takes requests"),
    Seam(f"{_MANAGER}.auto_create_handle_loop", "self", "has answers of the schedulers received"),
    *_names(_MANAGER, "leads to the processes that SGLang watches", "_subprocess_watchdog"),
    *_names(_MANAGER, "leads to the ids of adapters", "lora_registry"),
    *_names("sglang.srt.utils.watchdog.SubprocessWatchdog", "the processes that SGLang watches", "_processes"),
    Seam("sglang.srt.lora.lora_registry.LoRARegistry.get_all_adapters", "self", "the ids of adapters by their names"),
    *_names("sglang.srt.lora.lora_registry.LoRARef", "an adapter's id, which is part of keys", "lora_id"),
    _caller("sglang.srt.entrypoints.engine.Engine._launch_subprocesses", "check_server_args"),
    _caller(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
        "get_internal_state_communicator",
    ),
)

_COLLECTOR = "sglang.srt.observability.metrics_collector"
_REPORTER = "sglang.srt.managers.scheduler_components.metrics_reporter"

_HICACHE_GAUGES = (
    Seam(
        f"{_COLLECTOR}.SchedulerMetricsCollector.init_new",
        "cls, *, server_args, enable_priority_scheduling, enable_lora, enable_hierarchical_cache",
        "hooked to have HiCache's gauges",
    ),
    Seam(
        f"{_COLLECTOR}.SchedulerMetricsCollector.log_stats",
        None,
        "publishes what our hook fills in",
        ("enable_hierarchical_cache", "hicache_host_used_tokens", "hicache_host_total_tokens"),
    ),
    *_names(
        f"{_COLLECTOR}.SchedulerStats",
        "filled in by our hook",
        *("hicache_host_used_tokens", "hicache_host_total_tokens"),
    ),
    Seam(f"{_REPORTER}.SchedulerMetricsReporter", None, "given to our hook"),
    Seam(f"{_REPORTER}.SchedulerMetricsReporter._log_hicache_stats", "self", "hooked to fill in HiCache's gauges"),
    *_names(
        f"{_REPORTER}.SchedulerMetricsReporter", "leads to our cache and to what is published", "scheduler", "stats"
    ),
)

_TRACE = "sglang.srt.observability.trace"
_TRACED = "carries our part of a request's trace"

_TRACES = (
    *_names("sglang.srt.managers.schedule_batch.Req", _TRACED, "time_stats"),
    *_names("sglang.srt.observability.req_time_stats.ReqTimeStatsBase", _TRACED, "trace_ctx"),
    *_names(f"{_TRACE}.TraceNullContext", "says that a request is not traced", "tracing_enable"),
    *_names(f"{_TRACE}.TraceReqContext", "says whether a request is traced", "tracing_enable"),
    *_names(f"{_TRACE}_async.TraceReqContextAsync", "says whether a request is traced", "tracing_enable"),
    Seam(f"{_TRACE}.TraceReqContext", None, _TRACED),
    Seam(f"{_TRACE}.TraceReqContext.trace_slice", "self, slice, thread_finish_flag=False", _TRACED),
    Seam(f"{_TRACE}_async.TraceReqContextAsync.trace_slice", "self, slice_ctx, thread_finish_flag=False", _TRACED),
    Seam(f"{_TRACE}.TraceSliceContext", "slice_name, start_time_ns, end_time_ns, span, level, attrs, events", _TRACED),
    *_names(
        "sglang.srt.managers.schedule_batch.Req",
        "how much of a request is restored, for its trace",
        *("full_untruncated_fill_ids", "host_hit_length", "host_loaded_length"),
    ),
)

_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_EXTEND = "query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens"
_MODE = "scaling=None, enable_gqa=False, causal=False, is_cross_attn=False, sliding_window_size=None"

_CPU_MODE = (
    Seam(_ATTENTION, None, "the class that CPU mode's attention extends and replaces"),
    Seam(f"{_ATTENTION}.__init__", "self, model_runner", "overridden: keeps memory for gathers"),
    Seam(
        f"{_ATTENTION}._run_sdpa_forward_extend",
        f"self, {_EXTEND}, extend_prefix_lens, extend_seq_lens, encoder_lens=None, {_MODE}",
        "overridden: computes new rows only",
    ),
    Seam(
        f"{_ATTENTION}._run_sdpa_forward_decode",
        f"self, {_EXTEND}, encoder_lens=None, {_MODE}",
        "overridden: computes new rows only",
    ),
    _caller(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch._pad_inputs_to_size",
        "get_cpu_graph_seq_len_fill_value",
    ),
    *_names("sglang.srt.lora", "gets memory that is not pinned", "layers", "backend.torch_backend"),
    *_names("sglang.srt.lora", "where we put it", "layers.torch", "backend.torch_backend.torch"),
    *_of(
        "sglang.srt.models.deepseek_common",
        *_names("attention_backend_handler", "chooses a form of latent attention", "AttentionBackendRegistry"),
        Seam(
            "attention_backend_handler.AttentionBackendRegistry.register",
            "cls, backend_name, handler_func",
            "chooses a form of latent attention",
        ),
        *_names("attention_forward_methods.forward_methods", "the forms of latent attention", "AttnForwardMethod"),
        *_names("attention_forward_methods.forward_methods.AttnForwardMethod", "the absorbed form", "MLA"),
    ),
)

SEAMS: tuple[Seam, ...] = (
    *(*_PLUGIN, *_CONFIGURATION, *_CACHE, *_WRAPPER, *_LINKER_CALLS, *_CALLERS, *_BYTES, *_WEIGHTS),
    *(*_ENDPOINTS, *_HICACHE_GAUGES, *_TRACES, *_CPU_MODE),
)

"""Check the source of a vLLM version, without importing it, for everything the connector relies on.

    python scripts/check_vllm.py FOLDER...      each the unpacked wheel of one version

For versions that cannot be run here. Prints what is missing; exit status 1 if anything is.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CONNECTOR = REPO / "connector" / "vllm" / "connector.py"

# (file, class, names that it must define: methods, fields, or attributes set on self)
RELIED_ON: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "v1/request.py",
        "Request",
        (
            "request_id",
            "_all_token_ids",
            "prompt_token_ids",
            "prompt_embeds",
            "num_computed_tokens",
            "num_preemptions",
            "num_tokens",
            "lora_request",
            "cache_salt",
            "mm_features",
            "resumable",
            "skip_reading_prefix_cache",
        ),
    ),
    (
        "v1/core/sched/output.py",
        "SchedulerOutput",
        (
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
        ),
    ),
    ("v1/core/sched/output.py", "NewRequestData", ("req_id", "block_ids", "num_computed_tokens")),
    (
        "v1/core/sched/output.py",
        "CachedRequestData",
        ("req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"),
    ),
    ("v1/outputs.py", "KVConnectorOutput", ("kv_connector_worker_meta", "invalid_block_ids")),
    ("v1/kv_cache_interface.py", "FullAttentionSpec", ()),
    ("v1/kv_cache_interface.py", "UniformTypeKVCacheSpecs", ("kv_cache_specs",)),
    ("v1/kv_cache_interface.py", "KVCacheConfig", ("kv_cache_groups",)),
    ("v1/kv_cache_interface.py", "KVCacheGroupSpec", ("layer_names", "kv_cache_spec")),
    ("v1/core/kv_cache_manager.py", "KVCacheBlocks", ("get_block_ids",)),
    ("v1/attention/backends/cpu_attn.py", "CPUAttentionBackendImpl", ("do_kv_cache_update",)),
    ("multimodal/inputs.py", "MultiModalFeatureSpec", ("identifier", "mm_position")),
    ("lora/request.py", "LoRARequest", ("lora_name", "lora_int_id", "lora_path")),
    (
        "config/kv_transfer.py",
        "KVTransferConfig",
        ("kv_load_failure_policy", "kv_connector_extra_config", "engine_id", "is_kv_producer"),
    ),
    ("config/compilation.py", "CompilationConfig", ("static_forward_context",)),
    ("config/vllm.py", "VllmConfig", ("instance_id", "speculative_config", "load_config")),
    ("config/model.py", "ModelConfig", ("hf_config", "max_model_len", "quantization", "revision", "seed")),
    ("distributed/kv_transfer/kv_connector/v1/metrics.py", "KVConnectorStats", ("aggregate", "reduce")),
    ("distributed/kv_transfer/kv_connector/v1/metrics.py", "KVConnectorPromMetrics", ("observe",)),
    ("distributed/kv_transfer/kv_connector/v1/base.py", "KVConnectorWorkerMetadata", ("aggregate",)),
]

BASE = "distributed/kv_transfer/kv_connector/v1/base.py"


def problems(vllm: Path) -> list[str]:
    """What the vLLM source in folder `vllm` (the package itself) lacks."""
    found = []
    for file, name, wanted in RELIED_ON:
        node = _class(vllm / file, name)
        if node is None:
            found.append(f"{file}: no class {name}")
            continue
        has = _names(node)
        found += [f"{file}: {name} has no {want}" for want in wanted if want not in has]
    return found + _hooks(vllm)


def _hooks(vllm: Path) -> list[str]:
    """Hooks that we override with other parameters than vLLM calls them with."""
    base, ours = _class(vllm / BASE, "KVConnectorBase_V1"), _class(CONNECTOR, "KVStrataConnector")
    if base is None or ours is None:
        return [f"{BASE}: no class KVConnectorBase_V1"]
    theirs = {node.name: _parameters(node) for node in base.body if isinstance(node, ast.FunctionDef)}
    mine = {node.name: _parameters(node) for node in ours.body if isinstance(node, ast.FunctionDef)}
    return [
        f"{name}{parameters} where vLLM calls {name}{theirs[name]}"
        for name, parameters in mine.items()
        if name in theirs and parameters != theirs[name]
    ]


def _class(file: Path, name: str) -> ast.ClassDef | None:
    if not file.is_file():
        return None
    tree = ast.parse(file.read_text())
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _names(node: ast.ClassDef) -> set[str]:
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            names.add(inner.name)
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            names.add(inner.target.id)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            names.add(inner.attr)
    return names


def _parameters(node: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(argument.arg for argument in node.args.args)


def main(folders: list[str]) -> int:
    bad = 0
    for folder in folders:
        vllm = Path(folder) / "vllm" if (Path(folder) / "vllm").is_dir() else Path(folder)
        found = problems(vllm)
        bad += len(found)
        print(f"{folder}: {len(found)} problems")
        for problem in found:
            print(f"  {problem}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

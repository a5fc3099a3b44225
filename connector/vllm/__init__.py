"""vLLM's way in: `kv_connector` KVStrataConnector, `kv_connector_module_path` kvstrata.connector.vllm."""

from kvstrata.connector.vllm.connector import KVStrataConnector

__all__ = ["KVStrataConnector"]

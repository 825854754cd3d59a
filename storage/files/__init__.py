"""Files that survive a crash: durable writes and tensors with digests.

- ``durable``: bytes on disk: canonical JSON, digests, durable writes
- ``tensors``: tensors on disk as safetensors: same content, same bytes; every read can be checked against a digest
"""

__all__ = ["durable", "tensors"]

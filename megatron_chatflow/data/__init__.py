"""How a sample is read: Megatron's `.bin/.idx`, text and instruction domains, the blend and its loader (see README.md)."""

from megatron_chatflow.data.blend import Blend, open_blend, open_domains
from megatron_chatflow.data.builder import IndexedDatasetBuilder
from megatron_chatflow.data.indexed import IndexedDataset, best_dtype
from megatron_chatflow.data.instruct import InstructDomain
from megatron_chatflow.data.loader import Loader
from megatron_chatflow.data.manifest import Manifest, read_manifest, write_manifest
from megatron_chatflow.data.permute import domain_key, permutation
from megatron_chatflow.data.split import document_range, parse_split
from megatron_chatflow.data.stream import TextDomain
from megatron_chatflow.data.verify import verify

__all__ = [
    "Blend",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "InstructDomain",
    "Loader",
    "Manifest",
    "TextDomain",
    "best_dtype",
    "document_range",
    "domain_key",
    "open_blend",
    "open_domains",
    "parse_split",
    "permutation",
    "read_manifest",
    "verify",
    "write_manifest",
]

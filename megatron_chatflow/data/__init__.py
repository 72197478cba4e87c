"""From corpora to batches: Megatron's `.bin/.idx`, the datasets of the domains, and their blend.

See README.md.
"""

from megatron_chatflow.data.blend.blended_dataset import BlendedDataset, open_blend, open_domains
from megatron_chatflow.data.blend.dataloader import BlendDataLoader
from megatron_chatflow.data.blend.index_shuffle import domain_key, permutation
from megatron_chatflow.data.blend.instruct_dataset import InstructDataset
from megatron_chatflow.data.blend.text_dataset import TextDataset
from megatron_chatflow.data.blend.window_dataset import WindowOptions
from megatron_chatflow.data.corpus.index_header import best_dtype
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.data.corpus.manifest import Manifest, read_manifest, write_manifest
from megatron_chatflow.data.corpus.split import document_range, parse_split
from megatron_chatflow.data.corpus.verify import verify
from megatron_chatflow.data.corpus.writer import IndexedDatasetBuilder

__all__ = [
    "BlendedDataset",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "InstructDataset",
    "BlendDataLoader",
    "Manifest",
    "TextDataset",
    "WindowOptions",
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

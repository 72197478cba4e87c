"""Texts of several scripts, and the documents of a corpus of bytes."""

import pyarrow
import pyarrow.parquet

from megatron_chatflow.data import IndexedDataset

TEXTS = [
    "All human beings are born free and equal in dignity and rights.",
    "人人生而自由,在尊严和权利上一律平等。",
    "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน\r\nสอง\u2028บรรทัด",
    "</s> is text, and so are \u2581 and 👩‍👩‍👧‍👦",
]


EOS = 2


def documents(prefix):
    dataset = IndexedDataset(prefix)
    return [
        bytes(i for i in dataset.document(n) if i < 256).decode()
        for n in range(dataset.num_documents)
    ]


def write_table(path, rows, row_group_size=1000):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size
    )

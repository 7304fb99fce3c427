"""Writes random token blocks, for benchmarks where only their number matters."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_tokens(path: Path, num_blocks: int, block_length: int, vocabulary: int = 32000) -> Path:
    """Write random token blocks to a Parquet file."""
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(num_blocks, block_length)).astype(np.int32)
    pq.write_table(pa.table({"input_ids": list(ids)}), path)
    return path

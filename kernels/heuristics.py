"""How a kernel over rows of logits is launched: a stated rule by shape and processor, no search at the first call.

`python bench/tune.py` sweeps the choices on a GPU and says how far the rule is from the best of them.

A row's bits depend on its tile, which depends on vocabulary, dtype and alignment, and on the number of parts it is
split into. They must not depend on what else a launch is asked for: a policy whose statistics are wanted and a
reference whose are not give a margin of exactly 0 where they are equal. So tiles are of one size, and a kernel that
has registers to spare unrolls its loop instead, which reads further ahead in the same order.
"""

from typing import NamedTuple

import triton
from torch import Tensor

# One access of 16 bytes a thread is a tile's share of a row.
BYTES_PER_THREAD = 16
MIN_WARPS, MAX_WARPS = 4, 8
# Tiles read at once. Two keep 32 bytes a thread in flight: 32 KB on a multiprocessor that runs 1,024 threads, where an
# H100's latency times bandwidth needs 18 KB. One where a kernel keeps many more numbers a column or a lane, so that
# its registers leave room for more threads: statistics, and gradients through a softcap or of columns that lie apart.
UNROLL, HEAVY_UNROLL = 2, 1
# With fewer programs a multiprocessor than this, rows are split.
PROGRAMS_PER_PROCESSOR = 4
# A row has at most so many parts, each of one tile or more: they are merged in one block of that width.
MAX_SPLITS = 128
# Tiles of a row that one program of the backward pass goes over, so that it loads the row's numbers once for them.
BACKWARD_TILES = 8
# Stated, because Triton's default for fused multiply-adds is not the same in every version.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


class RowLaunch(NamedTuple):
    """Columns of a tile and of a lane; whether a lane's lie apart; tiles read at once; warps; programs to a row.

    `columns`, `vector`, `num_warps` and `splits` are powers of two.
    """

    columns: int
    vector: int
    interleaved: bool
    unroll: int
    num_warps: int
    splits: int

    def options(self) -> dict[str, int | bool]:
        """Keywords of a kernel's launch, all but `splits`, which is a dimension of its grid."""
        tile = {"COLUMNS": self.columns, "VECTOR": self.vector, "INTERLEAVED": self.interleaved}
        return tile | {"UNROLL": self.unroll, "num_warps": self.num_warps} | COMPILER_OPTIONS


def is_aligned(logits: Tensor) -> bool:
    """Whether every row of logits [..., V] can be read 16 bytes at a time, as Triton tells its compiler."""
    numbers = (logits.shape[-1], *logits.stride()[:-1])
    return logits.data_ptr() % 16 == 0 and all(number % 16 == 0 for number in numbers)


def row_launch(
    num_rows: int,
    vocab_size: int,
    element_size: int,
    num_processors: int,
    *,
    heavy: bool = False,
    aligned: bool = True,
) -> RowLaunch:
    """The launch for `num_rows` rows (policy's and reference's together) of `vocab_size` logits.

    Args:
        element_size: bytes of a logit.
        num_processors: multiprocessors of the GPU; 0 for a kernel that does not split rows.
        heavy: whether the kernel keeps so many numbers that its loop is not unrolled.
        aligned: whether every row can be read 16 bytes at a time, as `is_aligned` says.

    >>> row_launch(8192, 32064, 2, 132)
    RowLaunch(columns=2048, vector=8, interleaved=False, unroll=2, num_warps=8, splits=1)
    >>> [row_launch(rows, 128256, 2, 132).splits for rows in (1, 4, 16, 64, 512)]
    [64, 64, 32, 8, 2]
    >>> row_launch(1, 100, 4, 132, heavy=True, aligned=False)
    RowLaunch(columns=512, vector=4, interleaved=True, unroll=1, num_warps=4, splits=1)
    """
    vector = BYTES_PER_THREAD // element_size
    narrowest, widest = MIN_WARPS * 32 * vector, MAX_WARPS * 32 * vector
    columns = min(widest, max(narrowest, triton.next_power_of_2(vocab_size)))
    tiles = -(-vocab_size // columns)
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors // max(1, num_rows))
    # A power of two, down to what is wanted; of more parts than tiles the last would be empty.
    splits = min(1 << (max(1, wanted).bit_length() - 1), triton.next_power_of_2(tiles), MAX_SPLITS)
    return RowLaunch(columns, vector, not aligned, HEAVY_UNROLL if heavy else UNROLL, columns // vector // 32, splits)

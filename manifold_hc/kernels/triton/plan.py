"""Sizes of every launch: one heuristic by streams, channels and dtype, in one place.

The number of tokens decides only how many programs share the work, so that a token's coefficients
have the same bits in every batch and a new number of tokens compiles no kernel again.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

PROGRAMS = 528
"""Programs that keep a large GPU busy: four for each of 132 multiprocessors."""

VECTOR_BYTES = 16
"""The widest load of one thread."""

SUM_BLOCK = 1024
"""Partial sums that one program adds at a time."""

SPLIT_CHANNELS = 1280
"""Entries of a row of phi that one program of the projection reads."""

ONE_LAUNCH_BYTES = 8192
"""A token's streams up to this size are projected and read in one launch.

A block of 32 tokens then stays in a multiprocessor's cache between the two reads; above it,
reading phi once for each small block costs more than reading the streams a second time."""

WIDEST_ROWS = 128
"""Rows of phi that one program accumulates; more are split over programs."""


def interpreted() -> bool:
    """Return True if kernels run under Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def launching(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which x's device is the current one, as a launch needs."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def blocks(size: int, block: int) -> int:
    """Return the number of blocks that cover `size`."""
    return -(-size // block)


def padded(n: int) -> int:
    """Rows and columns of a matrix of n streams in registers."""
    return max(2, power_of_two(n))


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products with float32 operands; half-width streams fit in tf32."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def threads(warps: int, registers: int) -> dict[str, int]:
    """Warps of a program, and the registers that one of their threads may have.

    Without a bound the compiler spills a few to fit more programs; the bound is well above need.
    """
    return {"num_warps": warps} | ({} if torch.version.hip else {"maxnreg": registers})


def registers(n: int) -> int:
    """The bound for a kernel that holds matrices or products of n streams."""
    return 168 if 2 <= n <= 4 else 255


def vector(dtype: torch.dtype) -> int:
    """Channels in the widest load."""
    return VECTOR_BYTES // dtype.itemsize


def stream_tile(n: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens and channels of a tile that one wide load of every thread fills: a token a warp."""
    width = min(32 * vector(dtype), power_of_two(channels))
    tokens = min(32, 128 * vector(dtype) // width)
    return {"BT": tokens, "BC": width, **threads(4, registers(n))}


def product_tile(n: int, channels: int, dtype: torch.dtype, normed: bool = False) -> dict[str, int]:
    """Return `stream_tile` with its channels split into lanes (L) and channels of a thread (V).

    `normed`: two tiles more are in registers, those of u and its gradient.
    """
    tile = stream_tile(n, channels, dtype)
    width = tile.pop("BC")
    # Registers hold two tiles of n streams; rows that wide loads do not divide cost addresses.
    odd = channels % vector(dtype) != 0
    many = n > (2 if normed else 4 if odd else 6)
    V = min(2 if many and (odd or (normed and n > 6)) else 4 if many else vector(dtype), width)
    if odd:
        tile |= threads(4, 255)
    return {"L": min(32, width // V), "V": V, **tile}


def product_rows(n: int) -> int:
    """Output streams whose inner products with every stream are summed at once."""
    return n if n <= 8 else 4


def segments(token_blocks: int, channels: int, width: int) -> int:
    """Return the number of programs that share the channels of one token block."""
    return max(1, min(PROGRAMS // max(1, token_blocks), blocks(channels, width)))


def matrix_tokens(n: int) -> int:
    """Tokens whose matrices one program keeps in registers: one of its 128 threads a row."""
    return 128 // padded(n)


def matrix_tile(n: int) -> dict[str, int]:
    """Tile of the kernels that see nothing but matrices."""
    return {"BT": matrix_tokens(n), "P": padded(n), **threads(4, registers(n))}


def rows_tile(rows: int) -> int:
    """Rows of phi in one tile, at least the 16 of a matrix unit."""
    return min(WIDEST_ROWS, max(16, power_of_two(rows)))


def projection_tile(rows: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of `v phi^T`, and the entries (CHUNK) of a row that one program sums."""
    wide = dtype == torch.float32 or width % vector(dtype) != 0
    BK = min(32 if wide else 64, max(16, power_of_two(width)))
    splits = max(1, round(width / SPLIT_CHANNELS))
    CHUNK = blocks(blocks(width, splits), BK) * BK
    return {
        "BT": 64 if wide else 128,
        "BK": BK,
        "RB": rows_tile(rows),
        "CHUNK": CHUNK,
        "num_stages": 2 if torch.version.hip else 3,  # a stage fewer fits into 64 KiB
        **threads(8, 128 if rows <= 32 else 255),
    }


def boundary_tile(n: int, channels: int, rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the write that projects its result, and the channels (CHUNK) that one program sums.

    A thread holds a piece of one token's streams: as wide as one load, and no second token, whose
    matrix would have to be held too.
    """
    wide = dtype == torch.float32 or channels % vector(dtype) != 0
    BC = 16 if wide or n > 8 else 32
    splits = max(1, round(n * channels / SPLIT_CHANNELS))
    return {
        "BT": 64,
        "BC": BC,
        "RB": rows_tile(rows),
        "CHUNK": blocks(blocks(channels, splits), BC) * BC,
        "num_stages": 2 if torch.version.hip else 3,
        **threads(8, 255),
    }


def writes_at_once(n: int) -> int:
    """Unrolled writes of one launch; 0 where even one compiles for too long."""
    return min(8, 128 // (n * n)) if n <= 8 else 0


def normalise_tile(rows: int) -> dict[str, int]:
    """Tile of the launch that adds up the pieces of a projection."""
    RB = min(64, rows_tile(rows))
    return {"BT": 1024 // RB, "RB": RB, **threads(4, 128)}


def one_launch(n: int, channels: int, rows: int, dtype: torch.dtype) -> bool:
    """Return True if coefficients and read share a launch.

    Not on ROCm: there a barrier does not wait for the stores of its threads to memory.
    """
    if torch.version.hip:
        return False
    return n * channels * dtype.itemsize <= ONE_LAUNCH_BYTES and rows <= WIDEST_ROWS


def one_launch_tile(n: int, channels: int, rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of coefficients and read in one launch."""
    return {
        "BT": 32,
        "BK": min(64, max(16, power_of_two(n * channels))),
        "RB": rows_tile(rows),
        "BC": min(8 * vector(dtype), power_of_two(channels)),
        "num_stages": 3,
        **threads(4, 255),
    }


def gradient_tile(
    n: int, channels: int, rows: int, dtype: torch.dtype, normed: bool
) -> dict[str, int]:
    """Tile of the pass that makes the streams' gradient and sums phi's over tokens.

    A program sums OWN of ROW_BLOCKS blocks of rows. Two bounds, on the sums and on one tile of all
    streams, keep both in registers. With `normed` u is read again, which needs registers too.
    """
    aligned = channels % vector(dtype) == 0
    half = dtype != torch.float32 and aligned and not torch.version.hip
    RB = 32 if 16 < rows <= (64 if half else 32) else 16
    row_blocks = blocks(rows, RB)
    # Rows that wide loads do not divide cost registers for their addresses.
    own = min(row_blocks, WIDEST_ROWS // RB if rows % 4 == 0 and aligned else 3)
    P = power_of_two(n)
    room = 10240 if half else 5120 if aligned else 2560
    BC = min(room // (RB * own * P), (256 if half else 128 if aligned else 64) // P)
    BC = 1 << max(BC, 8, 16 // P).bit_length() - 1
    narrow = normed and n > (4 if half else 6)
    if narrow:
        BC //= 2
    return {
        "BT": 32 if half and RB * own <= 64 and not normed else 16,
        "BC": min(BC, max(16 // P, power_of_two(channels))),
        "RB": RB,
        "ROW_BLOCKS": row_blocks,
        "OWN": own,
        "STAGES": 1 if torch.version.hip or (normed and not half and not narrow) else 2,
        **threads(4 if torch.version.hip else 8, 255),
    }


def token_splits(tokens: int, tile: int, programs: int) -> int:
    """Return the number of ranges of tokens, where `programs` share each of them."""
    return max(1, min(PROGRAMS // programs, blocks(tokens, tile)))

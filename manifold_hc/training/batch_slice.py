"""Each rank's slice of a batch."""

from manifold_hc.data import Batch, Batches
from manifold_hc.parallel import Processes


def rank_slice(batches: Batches, first: int, processes: Processes) -> Batch:
    """Return this rank's slice of the batch that begins with sequence `first`.

    Data-parallel ranks take consecutive sequences, tensor-parallel ranks consecutive tokens.
    """
    size = batches.batch // processes.dp_size
    # take cuts sequences along the data-parallel axis, slice_sequences tokens along the tensor one.
    return batches.take(first + size * processes.dp_rank, size).slice_sequences(
        processes.tp_rank, processes.tp_size
    )

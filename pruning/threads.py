"""One thread for as long as bits matter.

Torch splits a reduction among its threads, so that the last bits of a saliency depend on how many there
are, and a width that hangs on a threshold with them. On nets as small as these one thread is also not slower,
and many times faster where other processes want the cores.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread inside the block, and on as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

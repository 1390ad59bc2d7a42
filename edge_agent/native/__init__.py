"""The compiled kernel: the passes over weights in C, with the same bits as numpy's."""

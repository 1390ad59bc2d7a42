/* What the two doors of the library share: Python's in kernel.c, ONNX Runtime's in ops.c. */
#ifndef SCALARFED_KERNEL_H
#define SCALARFED_KERNEL_H

#include "jobs.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* The path that SCALARFED_KERNEL names, or the best, with vectors of at most that many numbers. */
const struct path *best_path(int most_lanes);

#endif

/* One path of the kernel: compiled once per instruction set, with -DLANES=n -DPATH=name -DDOT=0 or 1. */
#if DOT && defined(__aarch64__) && !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+dotprod") /* GCC's and Clang's options for it differ */
#endif

#include "fold.h"
#include "layers.h"
#include "perturb.h"
#include "processor.h"
#include "update.h"

#define JOIN(a, b) a##b
#define NAME_OF(path) JOIN(path_, path)
#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

static int supported(void) { return processor_runs(LANES, DOT); }

const struct path NAME_OF(PATH) = {
    TEXT_OF(PATH), supported, perturb, update, fold, LANES, norm_plain, norm_blocked, block_filter,
};

/* One path of the kernel: compiled once per instruction set, with -DLANES=n -DPATH=name. */
#include "fold.h"
#include "perturb.h"
#include "update.h"

#define JOIN(a, b) a##b
#define NAME_OF(path) JOIN(path_, path)
#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

static int supported(void)
{
#if LANES == 16
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif LANES == 8
    return __builtin_cpu_supports("avx2");
#else
    return 1;
#endif
}

const struct path NAME_OF(PATH) = {TEXT_OF(PATH), supported, perturb, update, fold};

/* One path of the kernel: compiled once per instruction set, with -DLANES=n -DPATH=name -DDOT=0 or 1. */
#if DOT && defined(__aarch64__) && !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+dotprod") /* GCC's and Clang's options for it differ */
#endif

#include "fold.h"
#include "perturb.h"
#include "update.h"

#if DOT && defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define JOIN(a, b) a##b
#define NAME_OF(path) JOIN(path_, path)
#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

static int supported(void)
{
#if LANES == 16
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           (!DOT || (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")));
#elif LANES == 8
    return __builtin_cpu_supports("avx2");
#elif DOT && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1;
#endif
}

const struct path NAME_OF(PATH) = {TEXT_OF(PATH), supported, perturb, update, fold};

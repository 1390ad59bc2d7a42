/* What this processor and its operating system can run. */
#ifndef SCALARFED_PROCESSOR_H
#define SCALARFED_PROCESSOR_H

#include <stdint.h>

#if defined(__x86_64__)

#include <cpuid.h>

enum { LEAF_7_EBX_AVX2 = 1 << 5, LEAF_7_ECX_BYTES = 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 }; /* VBMI, VBMI2, VNNI, BITALG */
#define LEAF_7_EBX_AVX512 (1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) /* F, DQ, BW, VL */

/* Which vector registers the operating system saves: 0x06 with AVX, 0xE6 with AVX-512. */
static inline uint32_t saved_registers(void)
{
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & 1u << 27))
        return 0;
    __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

static inline int processor_runs(int lanes, int dot)
{
    uint32_t eax, ebx = 0, ecx = 0, edx, saved = saved_registers();
    if (lanes <= 4)
        return 1;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
        return 0;
    if (lanes == 8)
        return (saved & 0x06) == 0x06 && (ebx & LEAF_7_EBX_AVX2);
    if ((saved & 0xE6) != 0xE6 || (ebx & LEAF_7_EBX_AVX512) != LEAF_7_EBX_AVX512)
        return 0;
    return !dot || (ecx & LEAF_7_ECX_BYTES) == LEAF_7_ECX_BYTES;
}

#elif defined(__aarch64__) && defined(__linux__)

#include <asm/hwcap.h>
#include <sys/auxv.h>

static inline int processor_runs(int lanes, int dot)
{
    (void)lanes;
    return !dot || (getauxval(AT_HWCAP) & HWCAP_ASIMDDP);
}

#else

static inline int processor_runs(int lanes, int dot)
{
    (void)lanes;
    (void)dot;
    return 1;
}

#endif

#endif

/* A vector of LANES numbers of 32 bits, in plain C where LANES is 1.
 *
 * Every path is compiled from the same sources; they differ in LANES and compiler flags alone, and
 * each operation below is either on integers or one correctly rounded IEEE operation. So all paths
 * give the same bits. Needs GCC or Clang (vector extensions).
 */
#ifndef SCALARFED_VECTOR_H
#define SCALARFED_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
#error "float arithmetic must round to float: compile for SSE2 or another unit without excess precision"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the digest and the bundle are little-endian"
#endif

#define INLINE static inline __attribute__((always_inline))

#if LANES == 1

typedef float vf;
typedef uint32_t vu;
typedef int32_t vi;

INLINE vf to_float(vi x) { return (float)x; }
INLINE vu bits_of(vf x) { vu y; memcpy(&y, &x, 4); return y; }
INLINE vf float_of(vu x) { vf y; memcpy(&y, &x, 4); return y; }
INLINE vf least(vf a, vf b) { return a < b ? a : b; }
INLINE vf most(vf a, vf b) { return a > b ? a : b; }
INLINE vu load_half(const uint16_t *p) { return *p; }
INLINE void store_half(uint16_t *p, vu x) { *p = (uint16_t)x; }

#else

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vu bits_of(vf x) { return (vu)x; }
INLINE vf float_of(vu x) { return (vf)x; }

#if LANES == 16
INLINE vf least(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf most(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif LANES == 8
INLINE vf least(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf most(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__)
INLINE vf least(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
INLINE vf most(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
#elif defined(__ARM_NEON)
INLINE vf least(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vf most(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
#else
INLINE vf least(vf a, vf b) { vi m = a < b; return (vf)((m & (vi)a) | (~m & (vi)b)); }
INLINE vf most(vf a, vf b) { vi m = a > b; return (vf)((m & (vi)a) | (~m & (vi)b)); }
#endif

INLINE vu load_half(const uint16_t *p) { vh x; memcpy(&x, p, sizeof x); return __builtin_convertvector(x, vu); }
INLINE void store_half(uint16_t *p, vu x) { vh y = __builtin_convertvector(x, vh); memcpy(p, &y, sizeof y); }

#endif

INLINE vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf every(float x) { return (vf){0} + x; }
INLINE vu all(uint32_t x) { return (vu){0} + x; }

/* x - whole * unit, where the product is exact: with or without a fused operation it has the same bits. */
#if LANES == 16
INLINE vf less(vf x, vf whole, float unit) { return (vf)_mm512_fnmadd_ps((__m512)whole, (__m512)every(unit), (__m512)x); }
#elif LANES == 4 && defined(__ARM_NEON) && defined(__aarch64__)
INLINE vf less(vf x, vf whole, float unit) { return (vf)vfmsq_f32((float32x4_t)x, (float32x4_t)whole, (float32x4_t)every(unit)); }
#else
INLINE vf less(vf x, vf whole, float unit) { return x - whole * unit; }
#endif

#if LANES == 16
/* The smaller of two magnitudes with the sign of the first: one operation for two. */
INLINE vf clamp(vf x, float limit) { return (vf)_mm512_range_ps((__m512)x, (__m512)every(limit), 0x2); }
INLINE vf nearest(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
INLINE vf clamp(vf x, float limit) { return least(most(x, every(-limit)), every(limit)); }
/* Nearest whole number, ties to even, for |x| <= 2**22: adding 1.5 * 2**23 leaves no bits for a fraction. */
INLINE vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }
#endif

#endif

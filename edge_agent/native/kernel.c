/* The library's entry points for Python: which paths there are, and calls to the path of a given number. */
#include <stdlib.h>
#include <string.h>

#include "kernel.h"
#include "processor.h"

extern const struct path path_scalar;
#if defined(__x86_64__)
extern const struct path path_sse2, path_avx2, path_avx512, path_avx512vnni;
static const struct path *const PATHS[] = {&path_scalar, &path_sse2, &path_avx2, &path_avx512, &path_avx512vnni};
#elif defined(__aarch64__)
extern const struct path path_neon;
#if defined(__linux__) || defined(__APPLE__)
extern const struct path path_dotprod;
static const struct path *const PATHS[] = {&path_scalar, &path_neon, &path_dotprod};
#else
static const struct path *const PATHS[] = {&path_scalar, &path_neon};
#endif
#else
extern const struct path path_vector4;
static const struct path *const PATHS[] = {&path_scalar, &path_vector4};
#endif

EXPORT int scalarfed_abi(void) { return 2; }

EXPORT int scalarfed_paths(void) { return (int)(sizeof PATHS / sizeof *PATHS); }

EXPORT const char *scalarfed_path_name(int path) { return PATHS[path]->name; }

EXPORT int scalarfed_path_supported(int path) { return PATHS[path]->supported(); }

/* Channels that ONNX Runtime blocks images by on this processor: 16 with AVX-512, 0 where it does not. */
EXPORT int scalarfed_image_block(void)
{
#if defined(__x86_64__)
    return processor_runs(16, 0) ? 16 : processor_runs(8, 0) ? 8 : 0;
#else
    return 0;
#endif
}

EXPORT int scalarfed_perturb(int path, const struct perturb_job *job, int32_t number, int32_t times, int32_t following)
{
    return PATHS[path]->perturb(job, number, times, following);
}

EXPORT int scalarfed_update(int path, const struct update_job *job) { return PATHS[path]->update(job); }

const struct path *best_path(int most_lanes)
{
    const char *named = getenv("SCALARFED_KERNEL");
    const struct path *best = PATHS[0];
    for (int path = 0; path < scalarfed_paths(); path++) {
        if (PATHS[path]->lanes > most_lanes || !PATHS[path]->supported())
            continue;
        best = PATHS[path];
        if (named && !strcmp(named, best->name))
            break;
    }
    return best;
}

EXPORT uint64_t scalarfed_fold(int path, const uint32_t *words, int64_t size, int64_t first_block)
{
    return PATHS[path]->fold(words, size, first_block);
}

/* The library's entry points: which paths there are, and calls to the path of a given number. */
#include "jobs.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

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

EXPORT int scalarfed_abi(void) { return 1; }

EXPORT int scalarfed_paths(void) { return (int)(sizeof PATHS / sizeof *PATHS); }

EXPORT const char *scalarfed_path_name(int path) { return PATHS[path]->name; }

EXPORT int scalarfed_path_supported(int path) { return PATHS[path]->supported(); }

EXPORT int scalarfed_perturb(int path, const struct perturb_job *job) { return PATHS[path]->perturb(job); }

EXPORT int scalarfed_update(int path, const struct update_job *job) { return PATHS[path]->update(job); }

EXPORT uint64_t scalarfed_fold(int path, const uint32_t *words, int64_t size, int64_t first_block)
{
    return PATHS[path]->fold(words, size, first_block);
}

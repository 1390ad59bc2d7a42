/* Replays a fixed log by every path that the processor has, and prints the digests' sums.
 *
 * Linked with the kernel of any processor and run there, or under emulation; test_native_bits.py
 * makes the same log for numpy. Undoes perturbations on the way and says so if a bit is left over.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "jobs.h"

int scalarfed_paths(void);
const char *scalarfed_path_name(int path);
int scalarfed_path_supported(int path);
int scalarfed_perturb(int path, const struct perturb_job *job, int32_t number, int32_t times, int32_t following);
int scalarfed_update(int path, const struct update_job *job);
uint64_t scalarfed_fold(int path, const uint32_t *words, int64_t size, int64_t first_block);

enum { SIZE = 9008, STEPS = 2, PERTURBATIONS = 5 };

/* Jobs with their lists behind them. */
struct perturbation {
    struct perturb_job job;
    uint64_t keys[PERTURBATIONS][4];
};
struct update {
    struct update_job job;
    uint64_t keys[STEPS][PERTURBATIONS][4];
    int32_t wholes[STEPS][PERTURBATIONS];
    float amounts[STEPS];
};

static const int64_t SEGMENTS[] = {0, 1008, 2, 1008, 8208, 4, 8208, SIZE, 7};

int main(int count, char **words)
{
    const int rounds = count > 1 ? atoi(words[1]) : 1000;
    static float weights[SIZE], before[SIZE];
    static uint16_t curvature[SIZE];
    for (int path = 0; path < scalarfed_paths(); path++) {
        if (!scalarfed_path_supported(path))
            continue;
        for (int curved = 0; curved < 2; curved++) {
            for (int i = 0; i < SIZE; i++) {
                weights[i] = 0;
                curvature[i] = 0x3F80;
            }
            struct span span = {weights, curved ? curvature : 0, SEGMENTS, 3, 0, SIZE};
            for (int r = 0; r < rounds; r++) {
                struct update update = {
                    .job = {
                        span, STEPS, PERTURBATIONS, 2097152.0f, 12582912.0f, 1.0f, curved,
                        (float)((1.0 / 4096) / PERTURBATIONS), (float)(1.0 - (double)0.05f), 0.05f, 1e-4f,
                    },
                };
                for (int k = 0; k < STEPS; k++) {
                    update.amounts[k] = (float)((double)0.25f * (1.0 / 4096) / PERTURBATIONS);
                    for (int p = 0; p < PERTURBATIONS; p++) {
                        const uint64_t key[4] = {7, (uint64_t)r, (uint64_t)k, (uint64_t)p};
                        memcpy(update.keys[k][p], key, sizeof key);
                        update.wholes[k][p] = p == r % PERTURBATIONS ? 16256 : (r * 3001 + k * 977 + p * 7919) % 32513 - 16256;
                    }
                }
                if (r % 10 == 0) {
                    const int32_t asked[][3] = {{0, 1, 0}, {0, -2, 0}, {0, 1, 0}, {1, 1, -1}, {1, -1, 1}};
                    struct perturbation there = {.job = {span, 1e-3f, PERTURBATIONS}};
                    memcpy(there.keys, update.keys[0], sizeof there.keys);
                    memcpy(before, weights, sizeof weights);
                    for (int i = 0; i < 5; i++)
                        scalarfed_perturb(path, &there.job, asked[i][0], asked[i][1], asked[i][2]);
                    if (memcmp(before, weights, sizeof weights)) {
                        printf("%s left bits over\n", scalarfed_path_name(path));
                        return 1;
                    }
                }
                scalarfed_update(path, &update.job);
            }
            printf("%s %d %016llx %016llx\n", scalarfed_path_name(path), curved,
                   (unsigned long long)scalarfed_fold(path, (const uint32_t *)weights, SIZE, 0),
                   (unsigned long long)scalarfed_fold(path, (const uint32_t *)curvature, SIZE / 2, 0));
        }
    }
    return 0;
}

/* The library's door to ONNX Runtime: operators of the domain `scalarfed`.
 *
 * Normalise (x, scale, bias[, residual]) -> y, attributes groups, epsilon, activation, block
 * BlockFilter (w) -> blocked w, attributes block, narrow
 * Loss (logits, labels) -> mean cross-entropy, count of correct answers
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"
#include "onnxruntime.h"

/* Below so many values the threads of a pool cost more than they save. */
enum { WORTH_THREADS = 1 << 15 };

#define TRY(expression)                   \
    do {                                  \
        OrtStatus *status = (expression); \
        if (status)                       \
            return status;                \
    } while (0)

/* The entries of the table with their signatures. */

static OrtStatus *refuse(const OrtApi *api, const char *reason)
{
    typedef OrtStatus *(ORT_CALL * function)(int, const char *);
    return ((function)api->entries[ORT_CREATE_STATUS])(ORT_INVALID_ARGUMENT, reason);
}

static OrtStatus *attribute(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *value)
{
    typedef OrtStatus *(ORT_CALL * function)(const OrtKernelInfo *, const char *, int64_t *);
    return ((function)api->entries[ORT_ATTRIBUTE_INT64])(info, name, value);
}

static OrtStatus *attribute_float(const OrtApi *api, const OrtKernelInfo *info, const char *name, float *value)
{
    typedef OrtStatus *(ORT_CALL * function)(const OrtKernelInfo *, const char *, float *);
    return ((function)api->entries[ORT_ATTRIBUTE_FLOAT])(info, name, value);
}

static OrtStatus *data_of(const OrtApi *api, OrtValue *value, void **data)
{
    typedef OrtStatus *(ORT_CALL * function)(OrtValue *, void **);
    return ((function)api->entries[ORT_TENSOR_DATA])(value, data);
}

struct shape {
    size_t rank;
    int64_t size[4];
};

/* An input's data and shape; `data` is NULL for an optional input that is not there. */
static OrtStatus *input(const OrtApi *api, OrtKernelContext *context, size_t index, const void **data, struct shape *shape)
{
    typedef OrtStatus *(ORT_CALL * get)(const OrtKernelContext *, size_t, const OrtValue **);
    typedef OrtStatus *(ORT_CALL * get_shape)(const OrtValue *, OrtShape **);
    typedef OrtStatus *(ORT_CALL * get_rank)(const OrtShape *, size_t *);
    typedef OrtStatus *(ORT_CALL * get_sizes)(const OrtShape *, int64_t *, size_t);
    typedef void(ORT_CALL * release)(OrtShape *);
    const OrtValue *value = 0;
    OrtShape *found = 0;
    void *pointer = 0;
    *data = 0;
    TRY(((get)api->entries[ORT_CONTEXT_INPUT])(context, index, &value));
    if (!value)
        return 0;
    TRY(data_of(api, (OrtValue *)value, &pointer));
    *data = pointer;
    TRY(((get_shape)api->entries[ORT_TENSOR_SHAPE])(value, &found));
    OrtStatus *status = ((get_rank)api->entries[ORT_DIMENSION_COUNT])(found, &shape->rank);
    if (!status && shape->rank <= 4)
        status = ((get_sizes)api->entries[ORT_DIMENSIONS])(found, shape->size, shape->rank);
    ((release)api->entries[ORT_RELEASE_SHAPE])(found);
    if (!status && shape->rank > 4)
        status = refuse(api, "scalarfed: a tensor has more than four axes");
    return status;
}

static OrtStatus *output(const OrtApi *api, OrtKernelContext *context, size_t index, const int64_t *size, size_t rank,
                         void **data)
{
    typedef OrtStatus *(ORT_CALL * get)(OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **);
    OrtValue *value = 0;
    TRY(((get)api->entries[ORT_CONTEXT_OUTPUT])(context, index, size, rank, &value));
    return data_of(api, value, data);
}

static OrtStatus *for_each(const OrtApi *api, OrtKernelContext *context, void (*work)(void *, size_t), size_t count,
                           void *job, int64_t values)
{
    typedef OrtStatus *(ORT_CALL * function)(const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *);
    if (count > 1 && values >= WORTH_THREADS)
        return ((function)api->entries[ORT_PARALLEL_FOR])(context, work, count, 0, job);
    for (size_t i = 0; i < count; i++)
        work(job, i);
    return 0;
}

struct node {
    const OrtApi *api;
    const struct path *path;
    int64_t groups, activation, block, narrow;
    float epsilon;
};

/* Normalise */

struct norm_work {
    const struct path *path;
    struct norm_job job;
};

static void norm_group(void *given, size_t index)
{
    struct norm_work *work = given;
    const int64_t groups = work->job.groups;
    work->path->norm_plain(&work->job, (int64_t)index / groups, (int64_t)index % groups);
}

static void norm_sample(void *given, size_t index)
{
    struct norm_work *work = given;
    work->path->norm_blocked(&work->job, (int64_t)index);
}

static OrtStatus *normalise(void *given, OrtKernelContext *context)
{
    const struct node *node = given;
    const OrtApi *api = node->api;
    struct shape x_shape, scale_shape, bias_shape, residual_shape;
    const void *x, *scale, *bias, *residual;
    void *out;
    TRY(input(api, context, 0, &x, &x_shape));
    TRY(input(api, context, 1, &scale, &scale_shape));
    TRY(input(api, context, 2, &bias, &bias_shape));
    TRY(input(api, context, 3, &residual, &residual_shape));
    const int64_t channels = scale_shape.size[0];
    const int64_t held = node->block ? (channels + node->block - 1) / node->block * node->block : channels;
    if (x_shape.rank != 4 || scale_shape.rank != 1 || bias_shape.rank != 1 || bias_shape.size[0] != channels ||
        x_shape.size[1] != held || node->groups < 1 || channels % node->groups || held > MOST_CHANNELS)
        return refuse(api, "scalarfed: Normalise got shapes that do not fit");
    if (residual && (residual_shape.rank != 4 || memcmp(residual_shape.size, x_shape.size, sizeof x_shape.size)))
        return refuse(api, "scalarfed: Normalise got a residual of another shape");
    TRY(output(api, context, 0, x_shape.size, 4, &out));
    const int64_t samples = x_shape.size[0], area = x_shape.size[2] * x_shape.size[3];
    struct norm_work work = {
        node->path,
        {
            .out = out,
            .x = x,
            .residual = residual,
            .scale = scale,
            .bias = bias,
            .channels = channels,
            .groups = node->groups,
            .area = area,
            .block = node->block,
            .epsilon = node->epsilon,
            .activation = (int32_t)node->activation,
        },
    };
    const int64_t values = samples * held * area;
    if (node->block)
        return for_each(api, context, norm_sample, (size_t)samples, &work, values);
    return for_each(api, context, norm_group, (size_t)(samples * node->groups), &work, values);
}

/* BlockFilter */

struct filter_work {
    const struct path *path;
    struct filter_job job;
};

static void filter_block(void *given, size_t index)
{
    struct filter_work *work = given;
    work->path->block_filter(&work->job, (int64_t)index);
}

static OrtStatus *block_filter(void *given, OrtKernelContext *context)
{
    const struct node *node = given;
    const OrtApi *api = node->api;
    const int64_t block = node->block;
    struct shape shape;
    const void *filter;
    void *out;
    TRY(input(api, context, 0, &filter, &shape));
    if (shape.rank != 4 || block < 1)
        return refuse(api, "scalarfed: BlockFilter takes a filter of four axes");
    const int64_t outer = (shape.size[0] + block - 1) / block, inner = node->narrow ? 1 : block;
    const int64_t size[4] = {outer * block, (shape.size[1] + inner - 1) / inner * inner, shape.size[2], shape.size[3]};
    TRY(output(api, context, 0, size, 4, &out));
    struct filter_work work = {
        node->path,
        {
            .out = out,
            .filter = filter,
            .outputs = shape.size[0],
            .inputs = shape.size[1],
            .cells = shape.size[2] * shape.size[3],
            .block = block,
            .narrow = (int32_t)node->narrow,
        },
    };
    return for_each(api, context, filter_block, (size_t)outer, &work, size[0] * size[1] * work.job.cells);
}

/* Loss */

static OrtStatus *loss(void *given, OrtKernelContext *context)
{
    const OrtApi *api = ((const struct node *)given)->api;
    struct shape shape, label_shape;
    const void *logits, *labels;
    void *mean, *correct;
    TRY(input(api, context, 0, &logits, &shape));
    TRY(input(api, context, 1, &labels, &label_shape));
    if (shape.rank != 2 || label_shape.rank != 1 || label_shape.size[0] != shape.size[0] || shape.size[1] < 1)
        return refuse(api, "scalarfed: Loss takes logits (n, classes) and labels (n,)");
    TRY(output(api, context, 0, 0, 0, &mean));
    TRY(output(api, context, 1, 0, 0, &correct));
    double sum = 0;
    int64_t right = 0;
    for (int64_t i = 0; i < shape.size[0]; i++) {
        const float *row = (const float *)logits + i * shape.size[1];
        const int64_t label = ((const int64_t *)labels)[i];
        int64_t best = 0;
        if (label < 0 || label >= shape.size[1])
            return refuse(api, "scalarfed: Loss got a label beyond the classes");
        for (int64_t c = 1; c < shape.size[1]; c++)
            if (row[c] > row[best])
                best = c;
        float parts = 0;
        for (int64_t c = 0; c < shape.size[1]; c++)
            parts += expf(row[c] - row[best]);
        sum += (double)logf(parts) + ((double)row[best] - (double)row[label]);
        right += best == label;
    }
    *(float *)mean = (float)(sum / (double)shape.size[0]);
    *(int64_t *)correct = right;
    return 0;
}

/* Operators */

struct operator {
    OrtOp op; /* first, so that one pointer serves as the other */
    const char *name;
    size_t inputs, optional, outputs;
    OrtStatus *(*compute)(void *, OrtKernelContext *);
    int labels; /* the second input and output are int64 */
    int in_place;
};

static const char *ORT_CALL name_of(const OrtOp *op) { return ((const struct operator *)op)->name; }
static const char *ORT_CALL provider_of(const OrtOp *op) { (void)op; return 0; }
static size_t ORT_CALL input_count(const OrtOp *op) { return ((const struct operator *)op)->inputs; }
static size_t ORT_CALL output_count(const OrtOp *op) { return ((const struct operator *)op)->outputs; }
static int ORT_CALL type_of(const OrtOp *op, size_t index)
{
    return ((const struct operator *)op)->labels && index == 1 ? ORT_INT64 : ORT_FLOAT;
}
static int ORT_CALL input_kind(const OrtOp *op, size_t index)
{
    const struct operator *own = (const struct operator *)op;
    return index + own->optional >= own->inputs ? ORT_OPTIONAL : ORT_REQUIRED;
}
static int ORT_CALL output_kind(const OrtOp *op, size_t index) { (void)op; (void)index; return ORT_REQUIRED; }
static int ORT_CALL memory_of(const OrtOp *op, size_t index) { (void)op; (void)index; return 0; }
static int ORT_CALL one(const OrtOp *op) { (void)op; return 1; }
static int ORT_CALL many(const OrtOp *op) { (void)op; return INT32_MAX; }

static OrtStatus *ORT_CALL make_node(const OrtOp *op, const OrtApi *api, const OrtKernelInfo *info, void **made)
{
    struct node node = {.api = api};
    const char *name = ((const struct operator *)op)->name;
    if (!strcmp(name, "Normalise")) {
        TRY(attribute(api, info, "groups", &node.groups));
        TRY(attribute(api, info, "activation", &node.activation));
        TRY(attribute_float(api, info, "epsilon", &node.epsilon));
        TRY(attribute(api, info, "block", &node.block));
    } else if (!strcmp(name, "BlockFilter")) {
        TRY(attribute(api, info, "block", &node.block));
        TRY(attribute(api, info, "narrow", &node.narrow));
    }
    if (node.block && node.block != 8 && node.block != 16)
        return refuse(api, "scalarfed: blocks of 8 or 16 channels are known");
    node.path = best_path(node.block ? (int)node.block : 16);
    *made = malloc(sizeof node);
    if (!*made)
        return refuse(api, "scalarfed: no memory");
    memcpy(*made, &node, sizeof node);
    return 0;
}

static void *ORT_CALL make_node_or_null(const OrtOp *op, const OrtApi *api, const OrtKernelInfo *info)
{
    void *made = 0;
    return make_node(op, api, info, &made) ? 0 : made;
}

static int first_input_in_first_output[1];

static size_t ORT_CALL in_place(int **inputs, int **outputs)
{
    *inputs = *outputs = first_input_in_first_output;
    return 1;
}
static void ORT_CALL keep(int *inputs, int *outputs) { (void)inputs; (void)outputs; }

static OrtStatus *ORT_CALL compute_normalise(void *node, OrtKernelContext *context) { return normalise(node, context); }
static OrtStatus *ORT_CALL compute_filter(void *node, OrtKernelContext *context) { return block_filter(node, context); }
static OrtStatus *ORT_CALL compute_loss(void *node, OrtKernelContext *context) { return loss(node, context); }
static void ORT_CALL never(void *node, OrtKernelContext *context) { (void)node; (void)context; }

#define OPERATOR(compute)                                                                                            \
    {                                                                                                                \
        .version = 18, .CreateKernel = make_node_or_null, .GetName = name_of,                                        \
        .GetExecutionProviderType = provider_of, .GetInputType = type_of, .GetInputTypeCount = input_count,          \
        .GetOutputType = type_of, .GetOutputTypeCount = output_count, .KernelCompute = never, .KernelDestroy = free, \
        .GetInputCharacteristic = input_kind, .GetOutputCharacteristic = output_kind,                                \
        .GetInputMemoryType = memory_of, .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one,        \
        .GetVariadicOutputMinArity = one, .GetVariadicOutputHomogeneity = one, .CreateKernelV2 = make_node,          \
        .KernelComputeV2 = compute, .GetStartVersion = one, .GetEndVersion = many                                    \
    }

static struct operator normalise_operator = {OPERATOR(compute_normalise), "Normalise", 4, 1, 1, normalise, 0, 1};
static struct operator filter_operator = {OPERATOR(compute_filter), "BlockFilter", 1, 0, 1, block_filter, 0, 0};
static struct operator loss_operator = {OPERATOR(compute_loss), "Loss", 2, 0, 2, loss, 1, 0};

EXPORT OrtStatus *ORT_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    typedef OrtStatus *(ORT_CALL * create_domain)(const char *, OrtDomain **);
    typedef OrtStatus *(ORT_CALL * domain_add)(OrtDomain *, const OrtOp *);
    typedef OrtStatus *(ORT_CALL * add_domain)(OrtSessionOptions *, OrtDomain *);
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    if (!api)
        return 0; /* older than any that this package installs with: the graph will not load, another will */
    OrtDomain *domain = 0; /* lives as long as the process: sessions go on using it */
    normalise_operator.op.GetMayInplace = in_place;
    normalise_operator.op.ReleaseMayInplace = keep;
    TRY(((create_domain)api->entries[ORT_CREATE_DOMAIN])("scalarfed", &domain));
    TRY(((domain_add)api->entries[ORT_DOMAIN_ADD])(domain, &normalise_operator.op));
    TRY(((domain_add)api->entries[ORT_DOMAIN_ADD])(domain, &filter_operator.op));
    TRY(((domain_add)api->entries[ORT_DOMAIN_ADD])(domain, &loss_operator.op));
    return ((add_domain)api->entries[ORT_ADD_DOMAIN])(options, domain);
}

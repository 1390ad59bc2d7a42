/* The few parts of ONNX Runtime's C interface that a library of custom operators needs.
 *
 * The interface is a table of functions that only ever grows at its end; an entry is known by its
 * place. Places and signatures follow onnxruntime_c_api.h of ONNX Runtime (MIT licence), API version
 * 17 (release 1.17) and later.
 */
#ifndef SCALARFED_ONNXRUNTIME_H
#define SCALARFED_ONNXRUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

enum { ORT_API_VERSION = 17 };
enum { ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_INT64 = 7 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtDomain OrtDomain;

typedef void(ORT_CALL *OrtEntry)(void);
typedef struct OrtApi {
    OrtEntry entries[275];
} OrtApi;

typedef struct OrtApiBase {
    const OrtApi *(ORT_CALL *GetApi)(uint32_t version);
    const char *(ORT_CALL *GetVersionString)(void);
} OrtApiBase;

enum {
    ORT_CREATE_STATUS = 0,
    ORT_CREATE_DOMAIN = 26,
    ORT_DOMAIN_ADD = 27,
    ORT_ADD_DOMAIN = 28,
    ORT_TENSOR_DATA = 51,
    ORT_DIMENSION_COUNT = 61,
    ORT_DIMENSIONS = 62,
    ORT_TENSOR_SHAPE = 65,
    ORT_ATTRIBUTE_FLOAT = 85,
    ORT_ATTRIBUTE_INT64 = 86,
    ORT_CONTEXT_INPUT = 90,
    ORT_CONTEXT_OUTPUT = 91,
    ORT_RELEASE_SHAPE = 99,
    ORT_PARALLEL_FOR = 274,
};

/* An operator; the fields after KernelDestroy came later and are read from `version` on. */
typedef struct OrtOp {
    uint32_t version;
    void *(ORT_CALL *CreateKernel)(const struct OrtOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(ORT_CALL *GetName)(const struct OrtOp *);
    const char *(ORT_CALL *GetExecutionProviderType)(const struct OrtOp *);
    int(ORT_CALL *GetInputType)(const struct OrtOp *, size_t);
    size_t(ORT_CALL *GetInputTypeCount)(const struct OrtOp *);
    int(ORT_CALL *GetOutputType)(const struct OrtOp *, size_t);
    size_t(ORT_CALL *GetOutputTypeCount)(const struct OrtOp *);
    void(ORT_CALL *KernelCompute)(void *, OrtKernelContext *);
    void(ORT_CALL *KernelDestroy)(void *);
    int(ORT_CALL *GetInputCharacteristic)(const struct OrtOp *, size_t);
    int(ORT_CALL *GetOutputCharacteristic)(const struct OrtOp *, size_t);
    int(ORT_CALL *GetInputMemoryType)(const struct OrtOp *, size_t);
    int(ORT_CALL *GetVariadicInputMinArity)(const struct OrtOp *);
    int(ORT_CALL *GetVariadicInputHomogeneity)(const struct OrtOp *);
    int(ORT_CALL *GetVariadicOutputMinArity)(const struct OrtOp *);
    int(ORT_CALL *GetVariadicOutputHomogeneity)(const struct OrtOp *);
    OrtStatus *(ORT_CALL *CreateKernelV2)(const struct OrtOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(ORT_CALL *KernelComputeV2)(void *, OrtKernelContext *);
    OrtStatus *(ORT_CALL *InferOutputShapeFn)(const struct OrtOp *, void *);
    int(ORT_CALL *GetStartVersion)(const struct OrtOp *);
    int(ORT_CALL *GetEndVersion)(const struct OrtOp *);
    size_t(ORT_CALL *GetMayInplace)(int **, int **);
    void(ORT_CALL *ReleaseMayInplace)(int *, int *);
    size_t(ORT_CALL *GetAliasMap)(int **, int **);
    void(ORT_CALL *ReleaseAliasMap)(int *, int *);
} OrtOp;

#endif

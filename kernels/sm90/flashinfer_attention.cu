// FlashInfer's paged attention with sinks for Hopper as one function without PyTorch: bf16, heads of 64 dims, causal, all keys
// or a window. Compiled by nvcc (see library.py), against FlashInfer's headers; attention_schedule.cu makes its schedule.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <flashinfer/attention/hopper/attention_updater.cuh>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variant_helper.cuh>
#include <flashinfer/attention/mask.cuh>
#include <flashinfer/cutlass_utils.cuh>
#include <flashinfer/math.cuh>

using namespace flashinfer;

#include "attention_sink.inc"  // struct AttentionSink, which FlashInfer keeps in a string of its Python package

using tvm::ffi::TensorView;

struct Params {  // its members' names are what FlashInfer's templates ask for
    using DTypeQ = cutlass::bfloat16_t;
    using DTypeKV = cutlass::bfloat16_t;
    using DTypeO = cutlass::bfloat16_t;
    using IdType = int32_t;
    struct AdditionalParams {
        float* sink;
        double sm_scale;
    };
    DTypeQ* q_ptr;
    DTypeKV *k_ptr, *v_ptr;
    DTypeO* o_ptr;
    float* lse_ptr;
    IdType *kv_indices, *work_indptr;
    IdType *qo_tile_indices, *qo_indptr, *kv_indptr, *qo_lens, *kv_lens, *head_indices, *batch_indices;
    AdditionalParams additional_params;
    int64_t q_stride_n, q_stride_h, k_stride_n, k_stride_h, v_stride_n, v_stride_h, o_stride_n, o_stride_h;
    int64_t nnz_qo, k_page_stride, v_page_stride;
    int num_qo_heads, num_kv_heads, group_size, page_size, window_left;
    bool causal;
};

template <bool WINDOW>
cudaError_t run(Params& params, cudaStream_t stream) {
    return BatchPrefillWithPagedKVCacheDispatched<64, 64, MaskMode::kCausal, WINDOW, /*SAME_SCHEDULE_FOR_ALL_HEADS=*/false,
                                                  AttentionSink, Params>(params, /*enable_pdl=*/false, stream);
}

template <typename T>
T* data(TensorView tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

void check(cudaError_t status) { TVM_FFI_ICHECK(status == cudaSuccess) << cudaGetErrorString(status); }

// q [tokens, heads, 64]; cache [pages, 2, kv heads, page, 64]; pages i32 [sequences, entries]; items i32 [7, most] and starts
// i32 [processors + 1] of the schedule; sinks fp32 [heads]; out [tokens, heads * 64]. window: 0 = all keys.
void attention(TensorView q, TensorView cache, TensorView pages, TensorView items, TensorView starts, TensorView sinks,
               TensorView out, int64_t window, double scale) {
    const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = cache.size(2), page = cache.size(3);
    int device = 0, processors = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    TVM_FFI_ICHECK_EQ(dim, 64);
    TVM_FFI_ICHECK_EQ(processors, starts.size(0) - 1)
        << "the GPU has " << processors << " processors, and the schedule is for " << starts.size(0) - 1;
    Params params{};
    params.q_ptr = data<Params::DTypeQ>(q);
    params.k_ptr = data<Params::DTypeKV>(cache);
    params.v_ptr = params.k_ptr + kv_heads * page * dim;
    params.o_ptr = data<Params::DTypeO>(out);
    params.kv_indices = data<int32_t>(pages);
    params.work_indptr = data<int32_t>(starts);
    int32_t** const rows[] = {&params.qo_tile_indices, &params.qo_indptr, &params.kv_indptr, &params.qo_lens,
                              &params.kv_lens, &params.head_indices, &params.batch_indices};
    for (int i = 0; i < 7; i++) *rows[i] = data<int32_t>(items) + i * items.size(1);
    params.additional_params = {data<float>(sinks), scale};
    params.q_stride_n = params.o_stride_n = heads * dim;
    params.q_stride_h = params.o_stride_h = params.k_stride_n = params.v_stride_n = dim;
    params.k_stride_h = params.v_stride_h = page * dim;
    params.k_page_stride = params.v_page_stride = 2 * kv_heads * page * dim;
    params.nnz_qo = tokens;
    params.num_qo_heads = heads, params.num_kv_heads = kv_heads, params.group_size = heads / kv_heads;
    params.page_size = page, params.window_left = window - 1, params.causal = true;
    const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(q.device().device_type, q.device().device_id));
    check(window ? run<true>(params, stream) : run<false>(params, stream));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, attention);

// Pushes this rank's partial sums, which the kernel before left in `sums`, into slots on every rank: behind kernels that do
// not push themselves.
//
// Macros: VALUES, THREADS. A thread one value.
#include "exchange.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
exchange_push(const float* sums, const Header* exchange, u64* out) {
    __shared__ Header known;
    const Ranks ranks{exchange, known};
    trigger_next();
    copy_header(known, exchange);
    wait_for_copies();
    __syncthreads();
    wait_for_previous();
    const u32 tag = tag_of(exchange);
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < VALUES) push(out, VALUES, i, __uint_as_float(load_4(sums + i)), tag, ranks);
}

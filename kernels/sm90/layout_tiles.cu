// Dense weights into the layout `tiles` of kernels/layouts.py, once, when an artifact is loaded. One binary serves weights of
// every shape: the shape comes from memory. A thread makes 16 bytes of the result; neighbours write neighbouring bytes.
#include "common.cuh"

struct Parameters { int experts, rows, columns, down; };  // of a weight [experts, rows, columns]

extern "C" __global__ void tiles(const Parameters* shape, const uint4* source, const uint4* unused, uint4* out) {
    trigger_next();
    wait_for_previous();
    const long chunks = shape->columns / 8, count = (shape->rows + 63L) / 64 * 64 * chunks;
    for (long i = blockIdx.x * (long)blockDim.x + threadIdx.x; i < count; i += (long)gridDim.x * blockDim.x) {
        const long tile = i / 512, row = i % 512 / 8, chunk = i % 8 ^ (row & 7);  // 512 chunks a tile
        const long from_row = tile / (chunks / 8) * 64 + row, from_chunk = tile % (chunks / 8) * 8 + chunk;
        out[i] = from_row < shape->rows ? source[from_row * chunks + from_chunk] : make_uint4(0, 0, 0, 0);
    }
}

// As much of CUDA C++ as the kernels of edge/ use, for a C++ compiler: a kernel is a function, a launch is a loop.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#define __device__ static
#define __global__

using std::max;
using std::min;

struct Dim3 {
    unsigned x, y, z;
};
static thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;

static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline int __float2int_rn(float a) { return (int)std::lrint(a); }  // half to even

// Arguments lie where the addresses in `arguments` say, as cuLaunchKernel takes them.
template <typename... Types, std::size_t... Numbers>
static void call(void (*kernel)(Types...), void** arguments, std::index_sequence<Numbers...>) {
    kernel(*static_cast<Types*>(arguments[Numbers])...);
}

template <typename... Types>
static void launch(void (*kernel)(Types...), Dim3 grid, Dim3 block, void** arguments) {
    gridDim = grid, blockDim = block;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
                for (threadIdx.z = 0; threadIdx.z < block.z; threadIdx.z++)
                    for (threadIdx.y = 0; threadIdx.y < block.y; threadIdx.y++)
                        for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++)
                            call(kernel, arguments, std::index_sequence_for<Types...>());
}

#define LAUNCHED(kernel)                                                                                     \
    extern "C" void run_##kernel(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, \
                                 void** arguments) {                                                         \
        launch(kernel, {gx, gy, gz}, {bx, by, bz}, arguments);                                               \
    }

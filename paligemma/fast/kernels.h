// What both files of kernels share: numbers in bfloat16, the constants of rounding, rotary positions, and the functions
// for 8 and 4 bits that Python calls. Those pass on to a template in each file.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

typedef uint16_t bf16;

#define UNROLL _Pragma("GCC unroll 8") // partial sums stay in registers only if no loop indexes them

static const int GROUP = 64;     // 4-bit weights that share a step
static const float OUTLIER = 16; // in means of the absolute values of a row

struct Places { // of attention: the strides of batch, head and position
    int64_t q[3], k[3], v[3], mask[2];
};

static inline float number(float v) { return v; }

static inline float number(bf16 v) {
    uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline void put(float v, float* to) { *to = v; }

static inline void put(float v, bf16* to) { // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    *to = v != v ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float rounded(float v) { // to bfloat16 and back
    bf16 to;
    put(v, &to);
    return number(to);
}

// x: B x H x S rows of E numbers, with strides from[3] of batch, head, position; cos, sin: [B, S, E / 2]; y: [B, H, S, E].
// Rounded after every step, as PyTorch does.
extern "C" void rotary_bf16(
    const bf16* x, const bf16* cos, const bf16* sin, bf16* y, const int64_t* from, int B, int H, int S, int E,
    int threads) {
    const int half = E / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (S > 8)
    for (int row = 0; row < B * H * S; row++) {
        const int b = row / (H * S), h = row / S % H, s = row % S;
        const bf16* first = x + b * from[0] + h * from[1] + s * from[2];
        const bf16* second = first + half;
        const bf16* c = cos + size_t(b * S + s) * half;
        const bf16* n = sin + size_t(b * S + s) * half;
        bf16* to = y + size_t(row) * E;
#pragma omp simd
        for (int e = 0; e < half; e++) {
            const float a = number(first[e]), z = number(second[e]), of_cos = number(c[e]), of_sin = number(n[e]);
            put(rounded(a * of_cos) - rounded(z * of_sin), to + e);
            put(rounded(z * of_cos) + rounded(a * of_sin), to + half + e);
        }
    }
}

template <class T>
static void linear_int8(
    const T* x, const int8_t* w, const float* scale, const T* bias, T* y, int M, int N, int K, int threads);

template <class T>
static void linear_int4(
    const T* x, const uint8_t* w, const int8_t* steps, const float* scale, const T* bias, T* y, int M, int N, int K,
    int threads);

extern "C" void linear_int8_bf16(
    const bf16* x, const int8_t* w, const float* scale, const bf16* bias, bf16* y, int M, int N, int K, int threads) {
    linear_int8(x, w, scale, bias, y, M, N, K, threads);
}

extern "C" void linear_int8_f32(
    const float* x, const int8_t* w, const float* scale, const float* bias, float* y, int M, int N, int K,
    int threads) {
    linear_int8(x, w, scale, bias, y, M, N, K, threads);
}

extern "C" void linear_int4_bf16(
    const bf16* x, const uint8_t* w, const int8_t* steps, const float* scale, const bf16* bias, bf16* y, int M, int N,
    int K, int threads) {
    linear_int4(x, w, steps, scale, bias, y, M, N, K, threads);
}

extern "C" void linear_int4_f32(
    const float* x, const uint8_t* w, const int8_t* steps, const float* scale, const float* bias, float* y, int M,
    int N, int K, int threads) {
    linear_int4(x, w, steps, scale, bias, y, M, N, K, threads);
}

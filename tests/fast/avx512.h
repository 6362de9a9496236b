// The instructions of AVX-512 for a CPU without them. SIMDe (Debian's libsimde-dev, MIT licence,
// https://github.com/simd-everywhere/simde) spells most of them in others; the rest is spelled here, number by number.

#pragma once

#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// The numbers of a vector.
template <class T, class V>
union Lanes {
    static const int count = sizeof(V) / sizeof(T);
    V whole;
    T at[count];
    Lanes() {}
    Lanes(V v) : whole(v) {}
};

// Vector to vector, number by number.
template <class To, class T, class W, class V, class F>
static inline W each(V v, F f) {
    Lanes<T, V> from(v);
    Lanes<To, W> to;
    for (int i = 0; i < to.count; i++) to.at[i] = f(from.at[i]);
    return to.whole;
}

// The numbers whose bit is set; the others are not read, and are 0.
template <class T, class V>
static inline V load_masked(uint64_t mask, const void* memory) {
    Lanes<T, V> to;
    for (int i = 0; i < to.count; i++) to.at[i] = mask >> i & 1 ? ((const T*)memory)[i] : T(0);
    return to.whole;
}

template <class T, class V>
static inline void store_masked(void* memory, uint64_t mask, V v) {
    Lanes<T, V> from(v);
    for (int i = 0; i < from.count; i++)
        if (mask >> i & 1) ((T*)memory)[i] = from.at[i];
}

// Halves onto each other until one number is left, as the instruction's own sequence does.
template <class T, class V, class F>
static inline T fold(V v, F f) {
    Lanes<T, V> of(v);
    for (int n = of.count / 2; n; n /= 2)
        for (int i = 0; i < n; i++) of.at[i] = f(of.at[i], of.at[i + n]);
    return of.at[0];
}

static inline int32_t to_nearest(float v) {
    const float whole = std::nearbyint(v);
    return whole >= -2147483648.f && whole < 2147483648.f ? int32_t(whole) : INT32_MIN;
}

static inline __m256 half_of(__m512 v, int half) {
    Lanes<float, __m512> from(v);
    Lanes<float, __m256> to;
    for (int i = 0; i < 8; i++) to.at[i] = from.at[8 * half + i];
    return to.whole;
}

static inline __m512i gather(__m512i places, const void* memory, int scale) {
    return each<int32_t, int32_t, __m512i>(places, [=](int32_t place) {
        int32_t found;
        std::memcpy(&found, (const char*)memory + int64_t(place) * scale, 4);
        return found;
    });
}

static inline __mmask16 test_bytes(__m128i a, __m128i b) {
    Lanes<uint8_t, __m128i> x(a), y(b);
    int mask = 0;
    for (int i = 0; i < 16; i++) mask |= ((x.at[i] & y.at[i]) != 0) << i;
    return mask;
}

#define _mm512_cvtepi32_epi16(...) (each<int16_t, int32_t, __m256i>(__VA_ARGS__, [](int32_t x) { return int16_t(x); }))
#define _mm512_cvtepi32_ps(...) (each<float, int32_t, __m512>(__VA_ARGS__, [](int32_t x) { return float(x); }))
#define _mm512_cvtepu16_epi32(...) (each<int32_t, uint16_t, __m512i>(__VA_ARGS__, [](uint16_t x) { return int32_t(x); }))
#define _mm512_cvtps_epi32(...) (each<int32_t, float, __m512i>(__VA_ARGS__, to_nearest))
#define _mm512_extractf32x8_ps half_of
#define _mm512_i32gather_epi32 gather
#define _mm512_reduce_add_epi32(...) (fold<uint32_t>(__VA_ARGS__, [](uint32_t a, uint32_t b) { return a + b; }))
#define _mm512_reduce_add_ps(...) (fold<float>(__VA_ARGS__, [](float a, float b) { return a + b; }))
#define _mm512_reduce_max_ps(...) (fold<float>(__VA_ARGS__, [](float a, float b) { return a > b ? a : b; }))
#define _mm512_maskz_loadu_epi16 (load_masked<uint16_t, __m512i>)
#define _mm512_maskz_loadu_epi8 (load_masked<uint8_t, __m512i>)
#define _mm512_maskz_loadu_ps (load_masked<float, __m512>)
#define _mm256_maskz_loadu_epi16 (load_masked<uint16_t, __m256i>)
#define _mm_maskz_loadu_epi8 (load_masked<uint8_t, __m128i>)
#define _mm512_mask_storeu_ps (store_masked<float, __m512>)
#define _mm256_mask_storeu_epi16 (store_masked<uint16_t, __m256i>)
#define _mm_test_epi8_mask test_bytes

// Linear layers on a CPU with AVX2 and no 8-bit dot products. `kernels_avx512.cpp` does the same for AVX-512, and
// explains the ideas (rows of w a quarter of the matrix apart, panels, outliers, steps of groups) at its beginning.
//
// There are few rows while an answer is written: every weight is read from memory for each token, and using it must not
// take longer than reading it.
//
//     bfloat16   is the upper half of a float32: shifted into place, multiplied and summed as float32
//     8 bits     no instruction multiplies signed by signed bytes. |w| times x with the sign of w gives the same, and
//                two such products fit into 16 bits: 2 * 128 * 127 < 32768
//     4 bits     n in 0 .. 15 times x, four products in 16 bits, times the step of the group. The 8 in (n - 8) * step
//                is subtracted at the end, by the sums of x over the groups
//
// Registers hold R rows of x by four of w.
//
// For many rows (an image, a prompt) the number of multiplications per instruction counts. In bfloat16, PyTorch's
// float32 product is as fast as such a CPU can multiply, and there is no kernel here. Weights of 8 and 4 bits become
// 16-bit numbers, for which one instruction multiplies 16 pairs and adds neighbours: twice as many as in float32.
//
// Integer sums are exact, so few and many rows agree, and both agree with the other file, to the bit if nothing is
// clipped. Activations must be rounded the same way in both files.
//
// GELU and norms, at the end, are one pass over memory each; attention takes one query after the other.

#include "kernels.h"

static const int NR = 4;         // rows of w in a tile
static const int MR = 3;         // rows of x: 3 * 4 partial sums + 1 or 2 weights of the 16 registers
static const int BLOCK = 128;    // rows of x are padded with zeros to whole blocks
static const int AHEAD = 512;    // 8-bit and 4-bit weights are prefetched so many bytes ahead
static const int FEW = 48;       // up to so many rows, weights are read in place: a panel must be worth its copy
static const int TALL = 6;       // rows of x in a tile of many rows: 6 * 2 sums + 2 vectors of w + 2 more registers
static const int WIDE = 64;      // outputs of a panel
static const int DEEP = 256;     // inputs of a panel: 32 KB, a quarter of which stays in the first-level cache

static inline float sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_hadd_ps(half, half);
    return _mm_cvtss_f32(_mm_hadd_ps(half, half));
}

static inline int sum(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_hadd_epi32(half, half);
    return _mm_cvtsi128_si32(_mm_hadd_epi32(half, half));
}

static inline __m256i load_whole(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }

static inline __m128i load_half(const void* from) { return _mm_loadu_si128((const __m128i*)from); }

// The first `count` of 32 bytes, zeros after them. Not for inner loops: it would displace what is in registers.
static inline __m256i load_part(const void* from, int count) {
    alignas(32) char bytes[32] = {};
    std::memcpy(bytes, from, count);
    return _mm256_load_si256((const __m256i*)bytes);
}

// Keeps a loaded vector in its register: otherwise the compiler loads it again for each instruction that uses it.
static inline __m256i kept(__m256i v) {
    asm("" : "+x"(v));
    return v;
}

static int whole_blocks(int K) { return (K + BLOCK - 1) / BLOCK * BLOCK; }

// Calls body(R, m) for tiles of R = MR rows, and for one tile with the rest; R is a compile-time constant.
template <class Body>
static inline void tiles_of_rows(int M, Body body) {
    static_assert(MR == 3, "what is left over is one row or two");
    int m = 0;
    for (; m + MR <= M; m += MR) body(std::integral_constant<int, MR>(), m);
    if (M - m == 2) body(std::integral_constant<int, 2>(), m);
    if (M - m == 1) body(std::integral_constant<int, 1>(), m);
}

// ---------------------------------------------------------------------------------------------- bfloat16

// x in float32; of each 16 numbers first the even ones, then the odd ones: the order in which weights are unpacked.
template <int R>
static void tile_bf16(const float* x, size_t stride, const bf16* const* w, int K, float (*out)[NR]) {
    const __m256i upper = _mm256_set1_epi32(0xffff0000);
    __m256 acc[R][NR];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) acc[m][n] = _mm256_setzero_ps();
    const auto step = [&](int k, auto load) __attribute__((always_inline)) {
        UNROLL
        for (int n = 0; n < NR; n++) {
            const __m256i both = load(w[n] + k);
            const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
            UNROLL
            for (int m = 0; m < R; m++) {
                const float* from = x + m * stride + k;
                acc[m][n] = _mm256_fmadd_ps(even, _mm256_loadu_ps(from), acc[m][n]);
                acc[m][n] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(from + 8), acc[m][n]);
            }
        }
    };
    int k = 0;
    for (; k + 16 <= K; k += 16) step(k, load_whole);
    if (k < K) step(k, [&](const bf16* from) { return load_part(from, 2 * (K - k)); });
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) out[m][n] = sum(acc[m][n]);
}

// ---------------------------------------------------------------------------------------------- activations in 8 bits

struct Outlier {
    unsigned k; // its column (unsigned, so that divisions become shifts)
    float rest; // what was clipped
};

struct Row {
    float scale;
    std::vector<Outlier> outliers;
    std::vector<int16_t> groups; // the sum of each group
};

struct Rows {
    size_t stride;         // K, rounded up to whole blocks
    std::vector<int8_t> q; // [M, stride], zeros after K
    std::vector<Row> row;  // [M]
};

template <class T>
static void round_row(const T* x, int K, std::vector<float>& v, int8_t* q, Row& row) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    const int whole = int(v.size()); // zeros after K
    for (int k = 0; k < K; k++) v[k] = number(x[k]);
    __m256 largest8 = _mm256_setzero_ps(), sum8 = _mm256_setzero_ps();
    for (int k = 0; k < whole; k += 8) {
        const __m256 a = _mm256_andnot_ps(sign, _mm256_loadu_ps(&v[k]));
        largest8 = _mm256_max_ps(largest8, a), sum8 = _mm256_add_ps(sum8, a);
    }
    auto of_eight = [](__m256 of) {
        alignas(32) float eight[8];
        _mm256_store_ps(eight, of);
        return *std::max_element(eight, eight + 8);
    };
    const float total = sum(sum8);
    float largest = of_eight(largest8), bound = INFINITY;
    if (largest > OUTLIER * (total / K)) {
        bound = OUTLIER * (total / K), largest8 = _mm256_setzero_ps();
        for (int k = 0; k < whole; k += 8) {
            const __m256 a = _mm256_andnot_ps(sign, _mm256_loadu_ps(&v[k]));
            const __m256 ordinary = _mm256_cmp_ps(a, _mm256_set1_ps(bound), _CMP_LE_OQ);
            largest8 = _mm256_max_ps(largest8, _mm256_and_ps(ordinary, a));
        }
        largest = of_eight(largest8);
    }
    // NaN or infinity shows in the sum, and the result must then be NaN.
    row.scale = std::isfinite(total) ? largest / 127 : NAN;
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127 / largest : 0);
    for (int k = 0; k < whole; k += 8) {
        const __m256 a = _mm256_loadu_ps(&v[k]);
        __m256 steps = _mm256_mul_ps(a, inverse);
        steps = _mm256_max_ps(_mm256_min_ps(steps, _mm256_set1_ps(127)), _mm256_set1_ps(-127));
        const __m256i whole_steps = _mm256_cvtps_epi32(steps); // ties to even
        const __m128i words =
            _mm_packs_epi32(_mm256_castsi256_si128(whole_steps), _mm256_extracti128_si256(whole_steps, 1));
        _mm_storel_epi64((__m128i*)(q + k), _mm_packs_epi16(words, words));
        int beyond = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, a), _mm256_set1_ps(bound), _CMP_GT_OQ));
        for (; beyond; beyond &= beyond - 1) {
            const int at = k + __builtin_ctz(beyond);
            row.outliers.push_back({unsigned(at), v[at] - q[at] * row.scale});
        }
    }
    row.groups.resize(whole / GROUP);
    for (int g = 0; g < whole / GROUP; g++) {
        int16_t of_group = 0;
        for (int k = 0; k < GROUP; k++) of_group += q[g * GROUP + k];
        row.groups[g] = of_group;
    }
}

template <class T>
static Rows round_rows(const T* x, int M, int K, int threads) {
    Rows rows;
    rows.stride = whole_blocks(K);
    rows.q.resize(M * rows.stride);
    rows.row.resize(M);
#pragma omp parallel for num_threads(threads) schedule(static) if (M > FEW)
    for (int m = 0; m < M; m++) {
        std::vector<float> v(rows.stride);
        round_row(x + size_t(m) * K, K, v, &rows.q[m * rows.stride], rows.row[m]);
    }
    return rows;
}

// ---------------------------------------------------------------------------------------------- weights in 8 and 4 bits

template <int R>
static void tile_int8(const int8_t* x, size_t stride, const int8_t* const* w, int K, int (*out)[NR]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i acc[R][NR];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) acc[m][n] = _mm256_setzero_si256();
    const auto step = [&](int k, auto load) __attribute__((always_inline)) {
        UNROLL
        for (int n = 0; n < NR; n++) {
            _mm_prefetch((const char*)(w[n] + k + AHEAD), _MM_HINT_T0);
            const __m256i weights = load(w[n] + k), size = _mm256_abs_epi8(weights);
            UNROLL
            for (int m = 0; m < R; m++) {
                const __m256i v = _mm256_loadu_si256((const __m256i*)(x + m * stride + k));
                const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(v, weights));
                acc[m][n] = _mm256_add_epi32(acc[m][n], _mm256_madd_epi16(pairs, ones));
            }
        }
    };
    int k = 0;
    for (; k + 32 <= K; k += 32) step(k, load_whole);
    if (k < K) step(k, [&](const int8_t* from) { return load_part(from, K - k); });
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) out[m][n] = sum(acc[m][n]);
}

// 64 bytes hold 128 weights: the lower halves are one group, the upper halves the next.
template <int R>
static void tile_int4(
    const int8_t* x, size_t stride, const Row* row, const uint8_t* const* w, const int8_t* const* steps, int K,
    int (*out)[NR]) {
    const __m256i lower = _mm256_set1_epi8(15);
    __m256i acc[R][NR];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) acc[m][n] = _mm256_setzero_si256();
    for (int k = 0; k < K; k += 128) {
        __m256i only[4]; // for one row of x, registers have room for these
        if (R == 1)
            UNROLL
            for (int i = 0; i < 4; i++) only[i] = kept(load_whole(x + k + 32 * i));
        UNROLL
        for (int n = 0; n < NR; n++) {
            const __m256i a = kept(load_whole(w[n] + k / 2)), b = kept(load_whole(w[n] + k / 2 + 32));
            _mm_prefetch((const char*)(w[n] + k / 2 + AHEAD), _MM_HINT_T0);
            int16_t two; // steps of the lower and the upper halves
            std::memcpy(&two, steps[n] + k / GROUP, 2);
            const __m128i both = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(two));
            const __m256i step[2] = {_mm256_broadcastw_epi16(both), _mm256_broadcastw_epi16(_mm_srli_si128(both, 2))};
            UNROLL
            for (int half = 0; half < 2; half++) {
                const __m256i numbers = _mm256_and_si256(half ? _mm256_srli_epi16(a, 4) : a, lower);
                const __m256i others = _mm256_and_si256(half ? _mm256_srli_epi16(b, 4) : b, lower);
                UNROLL
                for (int m = 0; m < R; m++) {
                    const int8_t* v = x + m * stride + k + GROUP * half;
                    const __m256i first = _mm256_maddubs_epi16(numbers, R == 1 ? only[2 * half] : load_whole(v));
                    const __m256i second =
                        _mm256_maddubs_epi16(others, R == 1 ? only[2 * half + 1] : load_whole(v + 32));
                    const __m256i scaled = _mm256_madd_epi16(_mm256_add_epi16(first, second), step[half]);
                    acc[m][n] = _mm256_add_epi32(acc[m][n], scaled);
                }
            }
        }
    }
    UNROLL
    for (int m = 0; m < R; m++)
        for (int n = 0; n < NR; n++) {
            __m256i of_groups8 = _mm256_setzero_si256();
            int g = 0;
            for (; g + 16 <= K / GROUP; g += 16) {
                const __m256i sums = _mm256_loadu_si256((const __m256i*)&row[m].groups[g]);
                const __m256i their = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(steps[n] + g)));
                of_groups8 = _mm256_add_epi32(of_groups8, _mm256_madd_epi16(sums, their));
            }
            int of_groups = sum(of_groups8);
            for (; g < K / GROUP; g++) of_groups += int(row[m].groups[g]) * steps[n][g];
            out[m][n] = int(unsigned(sum(acc[m][n])) - 8u * unsigned(of_groups)); // overflows cancel
        }
}

// ---------------------------------------------------------------------------------------------- many rows

// 8 rows of 8 pieces of four bytes: row i, piece j becomes row j, piece i.
static inline void transpose(__m256i v[8]) {
    __m256i t[8];
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL
    for (int i = 0; i < 4; i++) { // a half of v[4 * j + i] now holds piece i or 4 + i of four rows
        t[i] = _mm256_permute2x128_si256(v[i], v[4 + i], 0x20);
        t[4 + i] = _mm256_permute2x128_si256(v[i], v[4 + i], 0x31);
    }
    UNROLL
    for (int i = 0; i < 8; i++) v[i] = t[i];
}

// Copies a panel, the weights of WIDE outputs from n on and `depth` inputs from `first` on, in 16 bits and in the order
// [WIDE / 16, DEEP / 2, 16, 2]: a pair of inputs beside that of the next output.
template <class Load>
static void copy_panel(int16_t* panel, int n, int N, int first, int depth, Load load) {
    for (int i = 0; i < WIDE; i += 8)
        for (int k = 0; k < depth; k += 16) {
            __m256i v[8];
            UNROLL
            for (int row = 0; row < 8; row++) v[row] = load(std::min(n + i + row, N - 1), first + k);
            transpose(v);
            int16_t* to = panel + i / 16 * 16 * DEEP + k * 16 + i % 16 * 2;
            UNROLL
            for (int pair = 0; pair < 8; pair++) _mm256_storeu_si256((__m256i*)(to + 32 * pair), v[pair]);
        }
}

// Adds to sums [TALL, WIDE] the products of TALL rows of x with 16 outputs of a panel, [pairs, 16, 2].
static void tile_of_panel(const int16_t* x, size_t stride, const int16_t* panel, int pairs, int* sums) {
    __m256i acc[TALL][2];
    UNROLL
    for (int m = 0; m < TALL; m++)
        UNROLL
        for (int n = 0; n < 2; n++) acc[m][n] = load_whole(sums + m * WIDE + 8 * n);
    for (int pair = 0; pair < pairs; pair++) {
        const __m256i w[2] = {load_whole(panel + 32 * pair), load_whole(panel + 32 * pair + 16)};
        UNROLL
        for (int m = 0; m < TALL; m++) {
            int two;
            std::memcpy(&two, x + m * stride + 2 * pair, 4);
            const __m256i v = kept(_mm256_set1_epi32(two));
            UNROLL
            for (int n = 0; n < 2; n++) acc[m][n] = _mm256_add_epi32(acc[m][n], _mm256_madd_epi16(v, w[n]));
        }
    }
    UNROLL
    for (int m = 0; m < TALL; m++)
        UNROLL
        for (int n = 0; n < 2; n++) _mm256_storeu_si256((__m256i*)(sums + m * WIDE + 8 * n), acc[m][n]);
}

// Adds to rests [WIDE] what was clipped of a number, times the weights of its column k of the panel.
static void add_outlier(float* rests, const int16_t* panel, int k, float clipped) {
    for (int i = 0; i < WIDE; i += 8) {
        const __m256i pairs = load_whole(panel + i / 16 * 16 * DEEP + k / 2 * 32 + i % 16 * 2);
        const __m256i column = _mm256_srai_epi32(k % 2 ? pairs : _mm256_slli_epi32(pairs, 16), 16);
        const __m256 adds = _mm256_mul_ps(_mm256_set1_ps(clipped), _mm256_cvtepi32_ps(column));
        _mm256_storeu_ps(rests + i, _mm256_add_ps(_mm256_loadu_ps(rests + i), adds));
    }
}

// load(n, k): 16 weights of row n from k on, in 16 bits, zeros after K.
template <class T, class Load>
static void many_rows(
    const Rows& rows, const float* scale, const T* bias, T* y, int M, int N, int threads, Load load) {
    const size_t stride = rows.stride, whole = (M + TALL - 1) / TALL * TALL; // rows in whole tiles, zeros after M
    std::vector<int16_t> x(whole * stride);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int m = 0; m < M; m++) std::copy_n(&rows.q[m * stride], stride, &x[m * stride]);
    std::vector<std::pair<int, Outlier>> outliers; // with their rows, by column: so they are found in a panel
    for (int m = 0; m < M; m++)
        for (const Outlier& outlier : rows.row[m].outliers) outliers.push_back({m, outlier});
    std::stable_sort(
        outliers.begin(), outliers.end(), [](const auto& a, const auto& b) { return a.second.k < b.second.k; });
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int n = 0; n < N; n += WIDE) {
        static thread_local std::vector<int16_t> panel(WIDE * DEEP);
        static thread_local std::vector<int> sums;    // [whole, WIDE]
        static thread_local std::vector<float> rests; // likewise: what outliers add
        sums.assign(whole * WIDE, 0);
        rests.assign(whole * WIDE, 0);
        auto next = outliers.begin();
        for (int first = 0; first < int(stride); first += DEEP) {
            const int depth = std::min(DEEP, int(stride) - first);
            copy_panel(panel.data(), n, N, first, depth, load);
            for (; next != outliers.end() && int(next->second.k) < first + depth; next++) {
                const auto& [m, outlier] = *next;
                add_outlier(&rests[size_t(m) * WIDE], panel.data(), int(outlier.k) - first, outlier.rest);
            }
            for (int i = 0; i < WIDE && n + i < N; i += 16)
                for (size_t m = 0; m < whole; m += TALL)
                    tile_of_panel(&x[m * stride + first], stride, &panel[i * DEEP], depth / 2, &sums[m * WIDE + i]);
        }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < WIDE && n + i < N; i++) {
                const size_t at = size_t(m) * WIDE + i;
                const float s = scale[n + i];
                put(sums[at] * s * rows.row[m].scale + rests[at] * s + (bias ? number(bias[n + i]) : 0),
                    y + size_t(m) * N + n + i);
            }
    }
}

// ---------------------------------------------------------------------------------------------- whole layers

// Four rows of w in a tile, a quarter of the matrix apart; the last tiles may compute the last row again.
static int rows_apart(int N) { return (N + NR - 1) / NR; }

// bias: [N] or null. x: [M, K], w: [N, K], y: [M, N].
extern "C" void linear_bf16(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int M, int N, int K, int threads) {
    const size_t stride = whole_blocks(K);
    std::vector<float> spread(M * stride);
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++)
            spread[m * stride + k / 16 * 16 + k % 2 * 8 + k % 16 / 2] = number(x[size_t(m) * K + k]);
    const int apart = rows_apart(N);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int first = 0; first < apart; first++) {
        int n[NR];
        const bf16* row[NR];
        for (int i = 0; i < NR; i++) n[i] = std::min(first + i * apart, N - 1), row[i] = w + size_t(n[i]) * K;
        tiles_of_rows(M, [&](auto R, int m) {
            float out[R()][NR];
            tile_bf16<R()>(&spread[m * stride], stride, row, K, out);
            for (int r = 0; r < R(); r++)
                for (int i = 0; i < NR; i++)
                    put(out[r][i] + (bias ? number(bias[n[i]]) : 0), y + size_t(m + r) * N + n[i]);
        });
    }
}

// tile(R, m, n, out): the sums of R rows of x, from m on, with the four rows n of w. weight(n, k): one number of w.
template <class T, class Tile, class Weight>
static void few_rows(
    const Rows& rows, const float* scale, const T* bias, T* y, int M, int N, int threads, Tile tile, Weight weight) {
    const int apart = rows_apart(N);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int first = 0; first < apart; first++) {
        int n[NR];
        for (int i = 0; i < NR; i++) n[i] = std::min(first + i * apart, N - 1);
        tiles_of_rows(M, [&](auto R, int m) {
            int out[R()][NR];
            tile(R, m, n, out);
            for (int r = 0; r < R(); r++) {
                const Row& row = rows.row[m + r];
                float rest[NR] = {};
                for (const Outlier& outlier : row.outliers)
                    for (int i = 0; i < NR; i++) rest[i] += outlier.rest * weight(n[i], outlier.k);
                for (int i = 0; i < NR; i++) {
                    const float s = scale[n[i]];
                    put(out[r][i] * s * row.scale + rest[i] * s + (bias ? number(bias[n[i]]) : 0),
                        y + size_t(m + r) * N + n[i]);
                }
            }
        });
    }
}

template <class T>
static void linear_int8(
    const T* x, const int8_t* w, const float* scale, const T* bias, T* y, int M, int N, int K, int threads) {
    const Rows rows = round_rows(x, M, K, threads);
    if (M > FEW)
        return many_rows(rows, scale, bias, y, M, N, threads, [&](int n, int k) {
            const int8_t* from = w + size_t(n) * K + k;
            if (k + 16 <= K) return _mm256_cvtepi8_epi16(load_half(from));
            return _mm256_cvtepi8_epi16(_mm256_castsi256_si128(load_part(from, std::max(K - k, 0))));
        });
    auto weight = [&](int n, unsigned k) { return float(w[size_t(n) * K + k]); };
    auto tile = [&](auto R, int m, const int* n, int (*out)[NR]) {
        const int8_t* row[NR];
        for (int i = 0; i < NR; i++) row[i] = w + size_t(n[i]) * K;
        tile_int8<R()>(&rows.q[m * rows.stride], rows.stride, row, K, out);
    };
    few_rows(rows, scale, bias, y, M, N, threads, tile, weight);
}

template <class T>
static void linear_int4(
    const T* x, const uint8_t* w, const int8_t* steps, const float* scale, const T* bias, T* y, int M, int N, int K,
    int threads) {
    const Rows rows = round_rows(x, M, K, threads);
    if (M > FEW)
        return many_rows(rows, scale, bias, y, M, N, threads, [&](int n, int k) {
            const __m128i bytes = load_half(w + size_t(n) * (K / 2) + k / 128 * 64 + k % 64);
            const __m128i numbers = _mm_and_si128(k % 128 < 64 ? bytes : _mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
            const __m256i signed_numbers = _mm256_cvtepi8_epi16(_mm_sub_epi8(numbers, _mm_set1_epi8(8)));
            return _mm256_mullo_epi16(signed_numbers, _mm256_set1_epi16(steps[size_t(n) * (K / GROUP) + k / GROUP]));
        });
    auto weight = [&](int n, unsigned k) {
        const int byte = w[size_t(n) * (K / 2) + k / 128 * 64 + k % 64];
        const int number = k % 128 < 64 ? byte & 15 : byte >> 4;
        return float((number - 8) * steps[size_t(n) * (K / GROUP) + k / GROUP]);
    };
    auto tile = [&](auto R, int m, const int* n, int (*out)[NR]) {
        const uint8_t* row[NR];
        const int8_t* row_steps[NR];
        for (int i = 0; i < NR; i++) {
            row[i] = w + size_t(n[i]) * (K / 2);
            row_steps[i] = steps + size_t(n[i]) * (K / GROUP);
        }
        tile_int4<R()>(&rows.q[m * rows.stride], rows.stride, &rows.row[m], row, row_steps, K, out);
    };
    few_rows(rows, scale, bias, y, M, N, threads, tile, weight);
}

// ---------------------------------------------------------------------------------------------- between the products

// y = table[x] * times, or table[x] without `times`: any function of a bfloat16, of which there are 65,536.
extern "C" void look_up_bf16(
    const bf16* table, const bf16* x, const bf16* times, bf16* y, int M, int K, int threads) {
    const int64_t count = int64_t(M) * K;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 4096)
    for (int64_t at = 0; at < count; at++)
        if (times) put(number(table[x[at]]) * number(times[at]), y + at);
        else y[at] = table[x[at]];
}

// Every row of x [M, K] divided by the root of its mean square and multiplied by 1 + weight [K]; float32 inside.
extern "C" void rms_norm_bf16(const bf16* x, const bf16* weight, bf16* y, float eps, int M, int K, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (M > 8)
    for (int m = 0; m < M; m++) {
        const bf16* row = x + size_t(m) * K;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int k = 0; k < K; k++) squares += number(row[k]) * number(row[k]);
        const float inverse = 1 / std::sqrt(squares / K + eps);
#pragma omp simd
        for (int k = 0; k < K; k++) put(number(row[k]) * inverse * (1 + number(weight[k])), y + size_t(m) * K + k);
    }
}

// y[b, s, h] = sum over t of softmax(scale * q[b, h, s] . k[b, h / G, t]) v[b, h / G, t], over the t that mask[b, s, t]
// allows, or over all without a mask; 0 if it allows none. q: B x H x S rows of E numbers; k, v: B x KV x T rows, KV =
// H / G. cap: scores go through cap * tanh(score / cap) first, unless it is 0.
extern "C" void attention_bf16(
    const bf16* q, const bf16* k, const bf16* v, const uint8_t* mask, bf16* y, const Places* places, float scale,
    float cap, int B, int H, int KV, int S, int T, int E, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int task = 0; task < B * S * H; task++) {
        const int b = task / (S * H), s = task / H % S, h = task % H, head = h / (H / KV);
        const bf16* from = q + b * places->q[0] + h * places->q[1] + s * places->q[2];
        const bf16* keys = k + b * places->k[0] + head * places->k[1];
        const bf16* values = v + b * places->v[0] + head * places->v[1];
        const uint8_t* seen = mask ? mask + b * places->mask[0] + s * places->mask[1] : nullptr;
        std::vector<float> query(E), weight(T), sums(E);
        for (int e = 0; e < E; e++) query[e] = number(from[e]) * scale;
        float largest = -INFINITY, total = 0;
        for (int t = 0; t < T; t++) {
            if (seen && !seen[t]) continue;
            const bf16* key = keys + t * places->k[2];
            float score = 0;
#pragma omp simd reduction(+ : score)
            for (int e = 0; e < E; e++) score += query[e] * number(key[e]);
            if (cap) score = cap * std::tanh(score / cap);
            weight[t] = score, largest = std::max(largest, score);
        }
        for (int t = 0; t < T; t++) {
            if (seen && !seen[t]) continue;
            const bf16* value = values + t * places->v[2];
            const float of_value = std::exp(weight[t] - largest);
            total += of_value;
#pragma omp simd
            for (int e = 0; e < E; e++) sums[e] += of_value * number(value[e]);
        }
        for (int e = 0; e < E; e++) put(total == 0 ? 0 : sums[e] / total, y + size_t(task) * E + e);
    }
}

#include "decoder_layer.h"

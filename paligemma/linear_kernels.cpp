// Linear layers on a CPU with AVX-512, for weights in bfloat16, 8 bits or 4 bits:
//
//     y[m, n] = sum over k of x[m, k] * w[n, k]
//
// Writing an answer token by token reads every weight of the model once per token and multiplies it with a single row
// of activations: what limits it is how fast memory can be read. All that a kernel can do is to keep memory busy and to
// make the weights smaller. Reading an image multiplies every weight with hundreds of rows: there the number of
// multiplications per instruction counts, and 8-bit ones come four to a lane.
//
// One idea serves both. Weights lie as in the checkpoint, a row of K numbers for each output, so the file is used as it
// is mapped. Every output is a dot product of two rows that both run along K. So a tile of MR rows of x and four rows
// of w is held in registers, one vector of partial sums for each pair, and summed up across the vector at the very end:
//
//              w row 0   w row 1   w row 2   w row 3
//     x row 0  acc[0][0] acc[0][1] acc[0][2] acc[0][3]      each 16 partial sums; a step along K loads 4 + MR vectors
//     ...                                                   and does 4 * MR multiply-adds with them
//     x row 5  acc[5][0] acc[5][1] acc[5][2] acc[5][3]
//
// 8-bit products are summed as integers, which is exact. The instruction multiplies unsigned with signed numbers:
// weights are made unsigned by adding 128, and what that adds to the sum is taken away again.
//
// A 4-bit weight is (n - 8) * step: n in 0 .. 15 its own, the step, in -15 .. 15, of its group of 64. That is an 8-bit
// number too, so it is summed like one, as exactly; a table of 16 bytes for each step makes it with one instruction.
//
// Activations are rounded to 8 bits with a scale per row of x. Trained networks have a few channels a hundred times
// larger than the rest; a scale that reaches them leaves no bits to the others. So a number larger than OUTLIER times
// the mean of its row is clipped, and the rest of it is multiplied apart, in float32. (At most one channel in OUTLIER
// can be such, since the mean would be larger otherwise.) Compare LLM.int8(), arXiv 2208.07339.
//
// No header of PyTorch is used: this compiles in seconds, and the same library serves every version.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint16_t bf16;

#define UNROLL _Pragma("GCC unroll 8") // the partial sums are in registers only where no loop is left to index them

static const int MR = 6;         // rows of x in a tile: 6 * 4 partial sums + 4 weights + 1 of the 32 registers
static const int NR = 4;         // rows of w
static const int BLOCK = 16;     // results that are written together: a row of y is long, and every row another page
static const int GROUP = 64;     // 4-bit weights that share a step
static const float OUTLIER = 16; // in means of the absolute values of a row

// ---------------------------------------------------------------------------------------------- numbers

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

static inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }

static inline __m512 load16(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

// Keeps a loaded vector in its register. Left alone, the compiler loads it anew for each of the four instructions that
// use it, and then loading is what limits a tile.
#define KEEP(vector) asm("" : "+v"(vector))

// The sums of four vectors, side by side.
static inline __m128 sums(const __m512 v[4]) {
    __m256 half[4];
    for (int i = 0; i < 4; i++) half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

static inline __m128i sums(const __m512i v[4]) {
    __m256i half[4];
    for (int i = 0; i < 4; i++)
        half[i] = _mm256_add_epi32(_mm512_castsi512_si256(v[i]), _mm512_extracti64x4_epi64(v[i], 1));
    __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// Memory that is kept from call to call, since the system is slow to give out large pieces.
struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
    void* of(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(64, size);
        }
        return memory;
    }
};

// ---------------------------------------------------------------------------------------------- bfloat16

#ifdef __AVX512BF16__
static inline __m512 multiply_add(__m512 acc, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
}
#else
static inline __m512 multiply_add(__m512 acc, __m512i w, __m512i x) { // a bfloat16 is the upper half of a float32
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    const __m512i odd_w = _mm512_and_si512(w, upper), odd_x = _mm512_and_si512(x, upper);
    const __m512i even_w = _mm512_slli_epi32(w, 16), even_x = _mm512_slli_epi32(x, 16);
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(even_w), _mm512_castsi512_ps(even_x), acc);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(odd_w), _mm512_castsi512_ps(odd_x), acc);
}
#endif

template <int R>
static void tile_bf16(const bf16* x, const bf16* const* w, int K, float (*out)[NR]) {
    __m512 acc[R][NR];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) acc[m][n] = _mm512_setzero_ps();
    for (int k = 0; k < K; k += 32) {
        const bool whole = K - k >= 32;
        const __mmask32 inside = whole ? 0xffffffffu : (1u << (K - k)) - 1;
        __m512i row[NR];
        UNROLL
        for (int n = 0; n < NR; n++)
            row[n] = whole ? _mm512_loadu_si512(w[n] + k) : _mm512_maskz_loadu_epi16(inside, w[n] + k);
        UNROLL
        for (int m = 0; m < R; m++) {
            const bf16* from = x + size_t(m) * K + k;
            __m512i v = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(inside, from);
            KEEP(v);
            UNROLL
            for (int n = 0; n < NR; n++) acc[m][n] = multiply_add(acc[m][n], row[n], v);
        }
    }
    UNROLL
    for (int m = 0; m < R; m++) _mm_storeu_ps(out[m], sums(acc[m]));
}

// ---------------------------------------------------------------------------------------------- activations in 8 bits

struct Outlier {
    int slot;   // which of the columns with outliers
    float rest; // what was clipped
};

struct Rows {
    int M, K, stride;    // stride: K, rounded up to whole vectors
    int8_t* q;           // [M, stride], zeros behind K
    float* scale;        // [M]
    int32_t* start;      // [M, 16]: -128 times the sum of each lane, where a dot product begins
    std::vector<std::vector<Outlier>> outliers; // of each row
    std::vector<int> columns;                   // in which they stand
};

template <class T>
static void round_row(const T* x, Rows& rows, int m, std::vector<std::pair<int, float>>& outliers) {
    const int K = rows.K;
    int8_t* q = rows.q + size_t(m) * rows.stride;
    float largest = 0, sum = 0, bound = INFINITY;
    int k = 0;
    __m512 largest16 = _mm512_setzero_ps(), sum16 = _mm512_setzero_ps();
    for (; k + 16 <= K; k += 16) {
        __m512 v = _mm512_abs_ps(load16(x + k));
        largest16 = _mm512_max_ps(largest16, v), sum16 = _mm512_add_ps(sum16, v);
    }
    largest = _mm512_reduce_max_ps(largest16), sum = _mm512_reduce_add_ps(sum16);
    for (; k < K; k++) largest = std::max(largest, std::fabs(number(x[k]))), sum += std::fabs(number(x[k]));
    if (largest > OUTLIER * (sum / K)) {
        bound = OUTLIER * (sum / K), largest = 0;
        for (k = 0; k < K; k++) {
            float v = std::fabs(number(x[k]));
            if (v <= bound) largest = std::max(largest, v);
        }
    }
    // Not a number, or infinite: the sum tells, and the result is then no number either.
    rows.scale[m] = std::isfinite(sum) ? largest / 127 : NAN;
    const float inverse = largest > 0 ? 127 / largest : 0;
    auto rounded = [&](float v) { return int8_t(std::max(-127.f, std::min(127.f, std::nearbyint(v * inverse)))); };
    for (k = 0; k + 16 <= K; k += 16) {
        __m512 v = _mm512_mul_ps(load16(x + k), _mm512_set1_ps(inverse));
        v = _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(127)), _mm512_set1_ps(-127));
        _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))); // ties to even
    }
    for (; k < K; k++) q[k] = rounded(number(x[k]));
    std::memset(q + K, 0, rows.stride - K);
    if (bound < INFINITY)
        for (k = 0; k < K; k++)
            if (std::fabs(number(x[k])) > bound) outliers.push_back({k, number(x[k]) - q[k] * rows.scale[m]});

    __m512i lanes = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi8(1);
    for (k = 0; k < rows.stride; k += 64) lanes = _mm512_dpbusd_epi32(lanes, ones, _mm512_load_si512(q + k));
    lanes = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(lanes, 7));
    _mm512_store_si512(rows.start + 16 * m, lanes);
}

template <class T>
static Rows round_rows(const T* x, int M, int K, int threads) {
    static thread_local Buffer q, scale, start;
    Rows rows;
    rows.M = M, rows.K = K, rows.stride = (K + 127) / 128 * 128;
    rows.q = (int8_t*)q.of(size_t(M) * rows.stride);
    rows.scale = (float*)scale.of(M * sizeof(float));
    rows.start = (int32_t*)start.of(size_t(M) * 64);
    std::vector<std::vector<std::pair<int, float>>> found(M);
#pragma omp parallel for num_threads(threads) schedule(static) if (M > 8)
    for (int m = 0; m < M; m++) round_row(x + size_t(m) * K, rows, m, found[m]);

    rows.outliers.resize(M);
    std::vector<int> slots;
    for (int m = 0; m < M; m++)
        for (auto& [k, rest] : found[m]) {
            if (slots.empty()) slots.assign(K, -1);
            if (slots[k] < 0) slots[k] = int(rows.columns.size()), rows.columns.push_back(k);
            rows.outliers[m].push_back({slots[k], rest});
        }
    return rows;
}

// ---------------------------------------------------------------------------------------------- weights in 8 bits

template <int R>
static void tile_int8(const Rows& rows, int m0, const int8_t* const* w, float (*out)[NR]) {
    const __m512i plus128 = _mm512_set1_epi8(-128);
    const int8_t* x = rows.q + size_t(m0) * rows.stride;
    __m512i acc[R][NR];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) acc[m][n] = _mm512_load_si512(rows.start + 16 * (m0 + m));
    for (int k = 0; k < rows.K; k += 64) {
        __m512i row[NR];
        if (rows.K - k >= 64) {
            UNROLL
            for (int n = 0; n < NR; n++) row[n] = _mm512_loadu_si512(w[n] + k);
        } else {
            UNROLL
            for (int n = 0; n < NR; n++) row[n] = _mm512_maskz_loadu_epi8((1ull << (rows.K - k)) - 1, w[n] + k);
        }
        UNROLL
        for (int n = 0; n < NR; n++) row[n] = _mm512_xor_si512(row[n], plus128);
        UNROLL
        for (int m = 0; m < R; m++) {
            __m512i v = _mm512_load_si512(x + size_t(m) * rows.stride + k);
            KEEP(v);
            UNROLL
            for (int n = 0; n < NR; n++) acc[m][n] = _mm512_dpbusd_epi32(acc[m][n], row[n], v);
        }
    }
    UNROLL
    for (int m = 0; m < R; m++) _mm_storeu_ps(out[m], _mm_cvtepi32_ps(sums(acc[m])));
}

// ---------------------------------------------------------------------------------------------- weights in 4 bits

// What each step makes of the 16 numbers, plus 128. (Steps beyond 15 are in no file that is what it should be.)
struct Tables {
    alignas(64) uint8_t of[256][16];
    Tables() {
        for (int step = 0; step < 256; step++)
            for (int n = 0; n < 16; n++) of[step][n] = uint8_t((n - 8) * int8_t(step) + 128);
    }
};
static const Tables tables;

// 64 bytes hold 128 weights: the lower halves are the first 64 of them, one group; the upper halves the next 64.
static inline void spread(const uint8_t* w, const int8_t* steps, __m512i* first, __m512i* second) {
    const __m512i lower = _mm512_set1_epi8(15), both = _mm512_loadu_si512(w);
    auto table = [](int8_t step) { return _mm512_broadcast_i32x4(_mm_load_si128((__m128i*)tables.of[uint8_t(step)])); };
    *first = _mm512_shuffle_epi8(table(steps[0]), _mm512_and_si512(both, lower));
    *second = _mm512_shuffle_epi8(table(steps[1]), _mm512_and_si512(_mm512_srli_epi16(both, 4), lower));
}

template <int R>
static void tile_int4(const Rows& rows, int m0, const uint8_t* const* w, const int8_t* const* steps, float (*out)[NR]) {
    const int8_t* x = rows.q + size_t(m0) * rows.stride;
    __m512i acc[R][NR];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) acc[m][n] = _mm512_load_si512(rows.start + 16 * (m0 + m));
    for (int k = 0; k < rows.K; k += 128) {
        UNROLL
        for (int n = 0; n < NR; n++) {
            __m512i first, second;
            spread(w[n] + k / 2, steps[n] + k / GROUP, &first, &second);
            UNROLL
            for (int m = 0; m < R; m++) {
                const int8_t* v = x + size_t(m) * rows.stride + k;
                acc[m][n] = _mm512_dpbusd_epi32(acc[m][n], first, _mm512_load_si512(v));
                acc[m][n] = _mm512_dpbusd_epi32(acc[m][n], second, _mm512_load_si512(v + 64));
            }
        }
    }
    UNROLL
    for (int m = 0; m < R; m++) _mm_storeu_ps(out[m], _mm_cvtepi32_ps(sums(acc[m])));
}

// ---------------------------------------------------------------------------------------------- whole layers

// Calls body(R, m) for tiles of R = MR rows and one of what is left over, R being a constant in each.
template <class Body>
static inline void tiles_of_rows(int M, Body body) {
    int m = 0;
    for (; m + MR <= M; m += MR) body(std::integral_constant<int, 6>(), m);
    switch (M - m) {
        case 1: body(std::integral_constant<int, 1>(), m); break;
        case 2: body(std::integral_constant<int, 2>(), m); break;
        case 3: body(std::integral_constant<int, 3>(), m); break;
        case 4: body(std::integral_constant<int, 4>(), m); break;
        case 5: body(std::integral_constant<int, 5>(), m); break;
    }
}

// The four rows of w in a tile are not neighbours but a quarter of the matrix apart. So a thread reads four streams of
// memory from end to end, each in its own pages, and the processor, which watches pages, fetches ahead in all of them.
// (With neighbours, which share a page where rows are short, 4-bit weights came at half the speed.)
static int rows_apart(int N) { return (N + NR - 1) / NR; } // the last tiles may do the last row again

// bias: [N] or null. x: [M, K], w: [N, K], y: [M, N].
extern "C" void linear_bf16(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int M, int N, int K, int threads) {
    const int apart = rows_apart(N);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int first = 0; first < apart; first++) {
        int n[NR];
        const bf16* row[NR];
        for (int i = 0; i < NR; i++) n[i] = std::min(first + i * apart, N - 1), row[i] = w + size_t(n[i]) * K;
        tiles_of_rows(M, [&](auto R, int m) {
            float out[R()][NR];
            tile_bf16<R()>(x + size_t(m) * K, row, K, out);
            for (int r = 0; r < R(); r++)
                for (int i = 0; i < NR; i++)
                    put(out[r][i] + (bias ? number(bias[n[i]]) : 0), y + size_t(m + r) * N + n[i]);
        });
    }
}

// tile(R, m, n, out): the sums of R rows of x from m on with the four rows n of w. weight(n, k): one number of w.
template <class T, class Tile, class Weight>
static void linear(
    const Rows& rows, const float* scale, const T* bias, T* y, int N, int threads, Tile tile, Weight weight) {
    const int M = rows.M, apart = rows_apart(N), columns = int(rows.columns.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int block = 0; block < apart; block += BLOCK) {
        const int wide = std::min(BLOCK, apart - block);
        static thread_local Buffer of_met, of_results;
        float* met = (float*)of_met.of(size_t(columns + 1) * sizeof(float[NR])); // the weights that outliers meet
        T* results = (T*)of_results.of(size_t(M) * NR * BLOCK * sizeof(T));      // [M, NR, BLOCK]
        for (int b = 0; b < wide; b++) {
            int n[NR];
            float scales[NR], biases[NR];
            for (int i = 0; i < NR; i++) {
                n[i] = std::min(block + b + i * apart, N - 1);
                scales[i] = scale[n[i]], biases[i] = bias ? number(bias[n[i]]) : 0;
            }
            tiles_of_rows(M, [&](auto R, int m) {
                float out[R()][NR];
                tile(R, m, n, out);
                if (m == 0) // only now: picked out before, they would break the streams
                    for (int c = 0; c < columns; c++)
                        for (int i = 0; i < NR; i++) met[c * NR + i] = weight(n[i], rows.columns[c]);
                for (int r = 0; r < R(); r++) {
                    __m128 sum = _mm_setzero_ps();
                    for (const Outlier& outlier : rows.outliers[m + r]) {
                        __m128 product = _mm_mul_ps(_mm_set1_ps(outlier.rest), _mm_load_ps(met + outlier.slot * NR));
                        sum = _mm_add_ps(sum, product);
                    }
                    float rest[NR];
                    _mm_storeu_ps(rest, sum);
                    T result[NR];
                    for (int i = 0; i < NR; i++)
                        put(out[r][i] * scales[i] * rows.scale[m + r] + rest[i] * scales[i] + biases[i], result + i);
                    for (int i = 0; i < NR; i++) results[(size_t(m + r) * NR + i) * BLOCK + b] = result[i];
                }
            });
        }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < NR; i++) {
                const int n = block + i * apart, inside = std::min(wide, N - n);
                if (inside > 0) std::copy_n(results + (size_t(m) * NR + i) * BLOCK, inside, y + size_t(m) * N + n);
            }
    }
}

template <class T>
static void linear_int8(
    const T* x, const int8_t* w, const float* scale, const T* bias, T* y, int M, int N, int K, int threads) {
    const Rows rows = round_rows(x, M, K, threads);
    auto tile = [&](auto R, int m, const int* n, float (*out)[NR]) {
        const int8_t* row[NR];
        for (int i = 0; i < NR; i++) row[i] = w + size_t(n[i]) * K;
        tile_int8<R()>(rows, m, row, out);
    };
    linear(rows, scale, bias, y, N, threads, tile, [&](int n, int k) { return float(w[size_t(n) * K + k]); });
}

static thread_local Buffer widened; // not inside the tile below, of which every R has its own

template <class T>
static void linear_int4(
    const T* x, const uint8_t* w, const int8_t* steps, const float* scale, const T* bias, T* y, int M, int N, int K,
    int threads) {
    const Rows rows = round_rows(x, M, K, threads);
    auto tile = [&](auto R, int m, const int* n, float (*out)[NR]) {
        const uint8_t* row[NR];
        const int8_t* row_steps[NR];
        for (int i = 0; i < NR; i++) {
            row[i] = w + size_t(n[i]) * (K / 2);
            row_steps[i] = steps + size_t(n[i]) * (K / GROUP);
        }
        if (M <= 2 * MR) return tile_int4<R()>(rows, m, row, row_steps, out);
        // For many rows the weights are made 8 bits wide once, and then multiplied as such: the same sums.
        int8_t* wide = (int8_t*)widened.of(size_t(NR) * K);
        const int8_t* wide_row[NR];
        for (int i = 0; i < NR; i++) {
            wide_row[i] = wide + size_t(i) * K;
            for (int k = 0; m == 0 && k < K; k += 128) {
                __m512i first, second;
                spread(row[i] + k / 2, row_steps[i] + k / GROUP, &first, &second);
                _mm512_store_si512(wide + size_t(i) * K + k, _mm512_xor_si512(first, _mm512_set1_epi8(-128)));
                _mm512_store_si512(wide + size_t(i) * K + k + 64, _mm512_xor_si512(second, _mm512_set1_epi8(-128)));
            }
        }
        tile_int8<R()>(rows, m, wide_row, out);
    };
    auto weight = [&](int n, int k) {
        int byte = w[size_t(n) * (K / 2) + k / 128 * 64 + k % 64];
        int number = k % 128 < 64 ? byte & 15 : byte >> 4;
        return float(int8_t((number - 8) * steps[size_t(n) * (K / GROUP) + k / GROUP]));
    };
    linear(rows, scale, bias, y, N, threads, tile, weight);
}

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

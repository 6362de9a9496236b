// Linear layers on a CPU with AVX-512, for weights in bfloat16, 8 bits or 4 bits:
//
//     y[m, n] = sum over k of x[m, k] * w[n, k]
//
// Writing an answer token by token reads every weight of the model once per token and multiplies it with a single row
// of activations: the speed of memory is the limit. All that a kernel can do is keep memory busy and make the weights
// smaller. Reading an image multiplies every weight with hundreds of rows: there the number of multiplications per
// instruction counts, and an instruction does four 8-bit ones per lane.
//
// Weights have the layout of the checkpoint, a row of K numbers for each output, so a memory-mapped file is used as it
// is. Sums are held in registers, a tile of MR rows of x by four vectors, in one of two ways:
//
//                 w 0       w 1       w 2       w 3
//     x row 0  acc[0][0] acc[0][1] acc[0][2] acc[0][3]      a step along K loads 4 + MR vectors
//     ...                                                   and does 4 * MR multiply-adds with them
//     x row 5  acc[5][0] acc[5][1] acc[5][2] acc[5][3]
//
// few rows:  w 0 .. 3 are rows of w, read in place. A vector holds 16 partial sums of one output, which are added to
//            each other at the very end.
// many rows: a panel of 64 rows of w is first copied into another order: the four bytes multiplied at once (two
//            bfloat16 numbers, or four of 8 bits) are placed beside those of the next output. A vector then holds the
//            sums of 16 outputs, and a row of x gives the same four bytes to all of them. No sums across a vector are
//            left to do, and a tile reads only a sixteenth as much of x. A panel is copied just before it is used and
//            stays in the CPU's cache while all rows use it, so there is never a second copy of all weights.
//
// 8-bit products are summed as integers, which is exact. The instruction multiplies unsigned with signed numbers: 128
// is added to the weights to make them unsigned, and what that adds to the sum is subtracted again.
//
// A 4-bit weight is (n - 8) * step: n in 0 .. 15 is its own, the step, in -15 .. 15, belongs to its group of 64. The
// result is an 8-bit number too, so it is summed like one, just as exactly. One instruction computes it, by a table of
// 16 bytes for each step.
//
// Activations are rounded to 8 bits with a scale per row of x. Trained networks have a few channels a hundred times
// larger than the rest; a scale that reached them would leave no bits to the others. So a number larger than OUTLIER
// times the mean of its row is clipped, and what was clipped is multiplied separately in float32. (At most one channel
// in OUTLIER can be so large: with more, the mean would be larger.) Compare LLM.int8(), arXiv 2208.07339.
//
// Between the products there are functions of single numbers, norms and attention. PyTorch makes a pass over memory for
// each of their steps, and takes some microseconds for each even if there is one row. At the end of this file each is a
// single pass, and attention is two products of many rows.
//
// No header of PyTorch is used: this compiles in seconds, and the same library serves every version.

#include "kernels.h"

static const int MR = 6;         // rows of x in a tile: 6 * 4 partial sums + 4 weights + 1 of the 32 registers
static const int NR = 4;         // rows of w
static const int WIDE = 64;      // outputs of a panel: four vectors
static const int DEEP = 512;     // four-byte steps of a panel: 128 KB, well inside the second-level cache
static const int FEW = 48;       // up to so many rows, weights are read in place: a panel must be worth its copy

// ---------------------------------------------------------------------------------------------- numbers

static inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }

static inline __m512 load16(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

static inline __mmask16 first_of_16(int count) { return count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0; }

// The first of 16 numbers: as many as `inside` has bits; zeros after them.
static inline __m512 load16(__mmask16 inside, const float* x) { return _mm512_maskz_loadu_ps(inside, x); }

static inline __m512 load16(__mmask16 inside, const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, x)), 16));
}

static inline __m512i load32(int count, const bf16* x) { // unchanged, zeros after the first `count`
    return count >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(count > 0 ? (1u << count) - 1 : 0, x);
}

static inline void put16(__mmask16 inside, __m512 v, float* to) { _mm512_mask_storeu_ps(to, inside, v); }

static inline void put16(__mmask16 inside, __m512 v, bf16* to) { // as `put`
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i upper = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    upper = _mm512_mask_mov_epi32(upper, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(to, inside, _mm512_cvtepi32_epi16(upper));
}

// Keeps a loaded vector in its register. Otherwise the compiler loads it again for each of the four instructions that
// use it, and loading then limits a tile.
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

// Memory that is kept from call to call: allocating large pieces is slow.
struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
    void* of(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(64, size);
            if (!memory) throw std::bad_alloc(); // ends the process, as a vector without room does; and says why
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
    int m, k;   // its row and column
    float rest; // what was clipped
};

struct Rows {
    int M, K, stride;    // stride: K, rounded up to whole vectors
    int8_t* q;           // [M, stride], zeros after K
    float* scale;        // [M]
    int32_t* start;      // [M]: -128 times the sum of q, the first summand of a dot product
    std::vector<std::vector<Outlier>> outliers; // of each row, in the order of k
};

template <class T>
static void round_row(const T* x, Rows& rows, int m) {
    const int K = rows.K;
    int8_t* q = rows.q + size_t(m) * rows.stride;
    __m512 largest16 = _mm512_setzero_ps(), sum16 = _mm512_setzero_ps();
    for (int k = 0; k < K; k += 16) {
        const __m512 v = _mm512_abs_ps(load16(first_of_16(K - k), x + k));
        largest16 = _mm512_max_ps(largest16, v), sum16 = _mm512_add_ps(sum16, v);
    }
    const float sum = _mm512_reduce_add_ps(sum16);
    float largest = _mm512_reduce_max_ps(largest16), bound = INFINITY;
    if (largest > OUTLIER * (sum / K)) {
        bound = OUTLIER * (sum / K), largest16 = _mm512_setzero_ps();
        for (int k = 0; k < K; k += 16) {
            const __m512 v = _mm512_abs_ps(load16(first_of_16(K - k), x + k));
            const __mmask16 ordinary = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_LE_OQ);
            largest16 = _mm512_mask_max_ps(largest16, ordinary, largest16, v);
        }
        largest = _mm512_reduce_max_ps(largest16);
    }
    // NaN or infinity shows in the sum, and the result must then be NaN.
    rows.scale[m] = std::isfinite(sum) ? largest / 127 : NAN;
    const float inverse = largest > 0 ? 127 / largest : 0;
    for (int k = 0; k < K; k += 16) {
        const __m512 v = load16(first_of_16(K - k), x + k);
        __m512 steps = _mm512_mul_ps(v, _mm512_set1_ps(inverse));
        steps = _mm512_max_ps(_mm512_min_ps(steps, _mm512_set1_ps(127)), _mm512_set1_ps(-127));
        _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(steps))); // ties to even
        unsigned beyond = _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(bound), _CMP_GT_OQ);
        for (; beyond; beyond &= beyond - 1) {
            const int at = k + __builtin_ctz(beyond);
            rows.outliers[m].push_back({m, at, number(x[at]) - q[at] * rows.scale[m]});
        }
    }
    std::memset(q + K, 0, rows.stride - K);

    __m512i lanes = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi8(1);
    for (int k = 0; k < rows.stride; k += 64) lanes = _mm512_dpbusd_epi32(lanes, ones, _mm512_load_si512(q + k));
    rows.start[m] = -128 * _mm512_reduce_add_epi32(lanes);
}

template <class T>
static Rows round_rows(const T* x, int M, int K, int threads) {
    static thread_local Buffer q, scale, start;
    Rows rows;
    rows.M = M, rows.K = K, rows.stride = (K + 127) / 128 * 128;
    rows.q = (int8_t*)q.of(size_t(M) * rows.stride);
    rows.scale = (float*)scale.of(M * sizeof(float));
    rows.start = (int32_t*)start.of(size_t(M) * sizeof(int32_t));
    rows.outliers.resize(M);
#pragma omp parallel for num_threads(threads) schedule(static) if (M > 8)
    for (int m = 0; m < M; m++) round_row(x + size_t(m) * K, rows, m);
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
        for (int n = 0; n < NR; n++) acc[m][n] = _mm512_maskz_set1_epi32(1, rows.start[m0 + m]);
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

// For each step, the 16 products (n - 8) * step, plus 128. (Only a damaged file has steps beyond 15.)
struct Tables {
    alignas(64) uint8_t of[256][16];
    Tables() {
        for (int step = 0; step < 256; step++)
            for (int n = 0; n < 16; n++) of[step][n] = uint8_t((n - 8) * int8_t(step) + 128);
    }
};
static const Tables tables;

// 64 bytes hold 128 weights: the lower halves are the first 64 of them, one group; the upper halves the next 64, from
// k = 64 on. This returns one group, whose step is given, plus 128.
static inline __m512i spread(const uint8_t* w, int8_t step, int k) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((__m128i*)tables.of[uint8_t(step)]));
    __m512i both = _mm512_loadu_si512(w);
    if (k >= GROUP) both = _mm512_srli_epi16(both, 4);
    return _mm512_shuffle_epi8(table, _mm512_and_si512(both, _mm512_set1_epi8(15)));
}

template <int R>
static void tile_int4(const Rows& rows, int m0, const uint8_t* const* w, const int8_t* const* steps, float (*out)[NR]) {
    const int8_t* x = rows.q + size_t(m0) * rows.stride;
    __m512i acc[R][NR];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < NR; n++) acc[m][n] = _mm512_maskz_set1_epi32(1, rows.start[m0 + m]);
    for (int k = 0; k < rows.K; k += 128) {
        UNROLL
        for (int n = 0; n < NR; n++) {
            // The processor by itself fetches 4-bit weights too late: this is a seventh faster, for one row. (Larger
            // weights lose as much by it.)
            if (R == 1) _mm_prefetch((const char*)(w[n] + k / 2 + 512), _MM_HINT_T0);
            const __m512i first = spread(w[n] + k / 2, steps[n][k / GROUP], 0);
            const __m512i second = spread(w[n] + k / 2, steps[n][k / GROUP + 1], GROUP);
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

// ---------------------------------------------------------------------------------------------- many rows

// Calls body(R, m) for tiles of R = MR rows, and for one tile with the rest; R is a compile-time constant.
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

// 16 rows of 16 four-byte pieces: row i, piece j becomes row j, piece i.
static inline void transpose(__m512i v[16]) {
    __m512i t[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL
    for (int i = 0; i < 4; i++) { // a quarter of v[4 * j + i] now holds piece i, 4 + i, 8 + i or 12 + i of four rows
        __m512i a = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x44), b = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x44);
        __m512i c = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xee), d = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xee);
        t[i] = _mm512_shuffle_i32x4(a, b, 0x88), t[4 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(c, d, 0x88), t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    UNROLL
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

static inline __m512i multiply_add(__m512i acc, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }

// Adds to sums [R, WIDE] the products of R rows of x with a panel [steps, WIDE], or with the first C of its vectors. x
// and panel are in pieces of four bytes.
template <class Sums, int R, int C = NR>
static void tile_of_panel(const char* x, size_t stride, const char* panel, int steps, int32_t* sums) {
    Sums acc[R][C];
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < C; n++) acc[m][n] = (Sums)_mm512_load_si512(sums + m * WIDE + 16 * n);
    for (int step = 0; step < steps; step++) {
        __m512i w[C];
        UNROLL
        for (int n = 0; n < C; n++) w[n] = _mm512_load_si512(panel + (size_t(step) * NR + n) * 64);
        UNROLL
        for (int m = 0; m < R; m++) {
            int32_t piece;
            std::memcpy(&piece, x + m * stride + 4 * size_t(step), 4);
            __m512i v = _mm512_set1_epi32(piece);
            KEEP(v);
            UNROLL
            for (int n = 0; n < C; n++) acc[m][n] = multiply_add(acc[m][n], w[n], v);
        }
    }
    UNROLL
    for (int m = 0; m < R; m++)
        UNROLL
        for (int n = 0; n < C; n++) _mm512_store_si512(sums + m * WIDE + 16 * n, (__m512i)acc[m][n]);
}

// Calls body(C) with the number of vectors of a panel that `left` outputs fill; C is a compile-time constant.
template <class Body>
static inline void parts_of_panel(int left, Body body) {
    if (left > 48) body(std::integral_constant<int, 4>());
    else if (left > 32) body(std::integral_constant<int, 3>());
    else if (left > 16) body(std::integral_constant<int, 2>());
    else body(std::integral_constant<int, 1>());
}

// Copies a panel from row n of w on, pieces [depth, WIDE] from step `first` on. load(n, step): 16 pieces of row n.
template <class Load>
static void copy_panel(char* panel, int n, int N, int first, int depth, Load load) {
    for (int group = 0; group < NR; group++)
        for (int step = 0; step < depth; step += 16) {
            __m512i v[16];
            UNROLL
            for (int i = 0; i < 16; i++) v[i] = load(std::min(n + 16 * group + i, N - 1), first + step);
            transpose(v);
            UNROLL
            for (int i = 0; i < 16; i++) _mm512_store_si512(panel + (size_t(step + i) * NR + group) * 64, v[i]);
        }
}

// x: M rows of `steps` pieces of four bytes, `stride` bytes apart. load(n, step): 16 pieces of row n of w.
// begin(m): the initial value of the sums of a row of x. packed(panel, first, depth): gets the copied panel, pieces
// [depth, WIDE] from step `first` on. finish(n, sums): takes the sums [M, WIDE] of the outputs from n on.
template <class Sums, class Load, class Begin, class Packed, class Finish>
static void many_rows(
    const void* x, size_t stride, int M, int N, int steps, int threads, Load load, Begin begin, Packed packed,
    Finish finish) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int n = 0; n < N; n += WIDE) {
        static thread_local Buffer of_panel, of_sums;
        char* panel = (char*)of_panel.of(size_t(DEEP) * WIDE * 4);
        int32_t* sums = (int32_t*)of_sums.of(size_t(M) * WIDE * 4);
        for (int m = 0; m < M; m++) std::fill_n(sums + size_t(m) * WIDE, WIDE, begin(m));
        for (int first = 0; first < steps; first += DEEP) {
            const int depth = std::min(DEEP, steps - first);
            copy_panel(panel, n, N, first, depth, load);
            packed(panel, first, depth);
            tiles_of_rows(M, [&](auto R, int m) {
                const char* from = (const char*)x + m * stride + 4 * size_t(first);
                tile_of_panel<Sums, R()>(from, stride, panel, depth, sums + size_t(m) * WIDE);
            });
        }
        finish(n, sums);
    }
}

// ---------------------------------------------------------------------------------------------- whole layers

// For few rows of x, the four rows of w in a tile are not neighbours but a quarter of the matrix apart. So a thread
// reads four streams of memory from end to end, each in pages of its own. The processor's prefetcher works by page, and
// fetches ahead in all of them. (Neighbouring rows share a page if they are short: 4-bit weights were then read at half
// the speed.)
static int rows_apart(int N) { return (N + NR - 1) / NR; } // the last tiles may compute the last row again

static void many_rows_bf16(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int M, int N, int K, int threads) {
    static thread_local Buffer padded; // pieces hold two numbers
    if (K % 2) {
        bf16* even = (bf16*)padded.of(size_t(M) * (K + 1) * sizeof(bf16));
        for (int m = 0; m < M; m++) *std::copy_n(x + size_t(m) * K, K, even + size_t(m) * (K + 1)) = 0;
        x = even;
    }
    auto load = [&](int n, int step) {
        const int k = 2 * step;
        const bf16* from = w + size_t(n) * K + k;
        _mm_prefetch((const char*)(from + 128), _MM_HINT_T0);
        return load32(K - k, from);
    };
    auto finish = [&](int n, const int32_t* sums) {
        for (int m = 0; m < M; m++)
            for (int i = 0; i < WIDE; i += 16) {
                const __mmask16 inside = first_of_16(N - n - i);
                __m512 sum = _mm512_load_ps(sums + size_t(m) * WIDE + i);
                if (bias) sum = _mm512_add_ps(sum, load16(inside, bias + n + i));
                put16(inside, sum, y + size_t(m) * N + n + i);
            }
    };
    const size_t stride = size_t(K + K % 2) * sizeof(bf16);
    auto begin = [](int) { return 0; };
    auto packed = [](const char*, int, int) {};
    many_rows<__m512>(x, stride, M, N, (K + 1) / 2, threads, load, begin, packed, finish);
}

// bias: [N] or null. x: [M, K], w: [N, K], y: [M, N].
extern "C" void linear_bf16(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int M, int N, int K, int threads) {
    if (M > FEW) return many_rows_bf16(x, w, bias, y, M, N, K, threads);
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

// tile(R, m, n, out): the sums of R rows of x, from m on, with the four rows n of w. weight(n, k): one number of w.
template <class T, class Tile, class Weight>
static void few_rows(
    const Rows& rows, const float* scale, const T* bias, T* y, int N, int threads, Tile tile, Weight weight) {
    const int apart = rows_apart(N);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int first = 0; first < apart; first++) {
        int n[NR];
        float scales[NR], biases[NR];
        for (int i = 0; i < NR; i++) {
            n[i] = std::min(first + i * apart, N - 1);
            scales[i] = scale[n[i]], biases[i] = bias ? number(bias[n[i]]) : 0;
        }
        tiles_of_rows(rows.M, [&](auto R, int m) {
            float out[R()][NR];
            tile(R, m, n, out);
            for (int r = 0; r < R(); r++) {
                float rest[NR] = {};
                for (const Outlier& outlier : rows.outliers[m + r]) // only here: earlier they would interrupt the streams
                    for (int i = 0; i < NR; i++) rest[i] += outlier.rest * weight(n[i], outlier.k);
                for (int i = 0; i < NR; i++) {
                    float result = out[r][i] * scales[i] * rows.scale[m + r] + rest[i] * scales[i] + biases[i];
                    put(result, y + size_t(m + r) * N + n[i]);
                }
            }
        });
    }
}

static thread_local Buffer of_rests;

// load(n, k): 64 numbers of row n of w, plus 128.
template <class T, class Load>
static void many_rows_8_bits(
    const Rows& rows, const float* scale, const T* bias, T* y, int N, int threads, Load load) {
    std::vector<Outlier> outliers; // by column
    for (const auto& of_row : rows.outliers) outliers.insert(outliers.end(), of_row.begin(), of_row.end());
    auto before = [](const Outlier& a, const Outlier& b) { return a.k < b.k; };
    std::stable_sort(outliers.begin(), outliers.end(), before);
    // The weights for the outliers are taken from the panel, where a column takes only four cache lines. Outliers are
    // sorted by column; their products are added to rests [M, WIDE].
    auto packed = [&](const char* panel, int first, int depth) {
        if (outliers.empty()) return;
        float* rests = (float*)of_rests.of(size_t(rows.M) * WIDE * sizeof(float));
        if (first == 0) std::fill_n(rests, size_t(rows.M) * WIDE, 0);
        auto outlier = std::lower_bound(outliers.begin(), outliers.end(), Outlier{0, 4 * first, 0}, before);
        for (; outlier != outliers.end() && outlier->k < 4 * (first + depth); outlier++) {
            const __m512i* column = (const __m512i*)panel + size_t(outlier->k / 4 - first) * NR;
            for (int i = 0; i < NR; i++) {
                __m512i v = _mm512_and_si512(_mm512_srli_epi32(column[i], outlier->k % 4 * 8), _mm512_set1_epi32(255));
                const __m512 weights = _mm512_cvtepi32_ps(_mm512_sub_epi32(v, _mm512_set1_epi32(128)));
                float* rest = rests + size_t(outlier->m) * WIDE + 16 * i;
                const __m512 adds = _mm512_mul_ps(_mm512_set1_ps(outlier->rest), weights);
                _mm512_store_ps(rest, _mm512_add_ps(_mm512_load_ps(rest), adds));
            }
        }
    };
    auto finish = [&](int n, const int32_t* sums) {
        const float* rests = (const float*)of_rests.memory;
        for (int m = 0; m < rows.M; m++)
            for (int i = 0; i < WIDE; i += 16) {
                const __mmask16 inside = first_of_16(N - n - i);
                const __m512 scales = load16(inside, scale + n + i);
                __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + size_t(m) * WIDE + i));
                sum = _mm512_mul_ps(_mm512_mul_ps(sum, scales), _mm512_set1_ps(rows.scale[m]));
                if (!outliers.empty())
                    sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_load_ps(rests + size_t(m) * WIDE + i), scales));
                if (bias) sum = _mm512_add_ps(sum, load16(inside, bias + n + i));
                put16(inside, sum, y + size_t(m) * N + n + i);
            }
    };
    auto begin = [&](int m) { return rows.start[m]; };
    auto pieces = [&](int n, int step) { return load(n, 4 * step); };
    many_rows<__m512i>(rows.q, rows.stride, rows.M, N, (rows.K + 3) / 4, threads, pieces, begin, packed, finish);
}

template <class T>
static void linear_int8(
    const T* x, const int8_t* w, const float* scale, const T* bias, T* y, int M, int N, int K, int threads) {
    const Rows rows = round_rows(x, M, K, threads);
    auto weight = [&](int n, int k) { return float(w[size_t(n) * K + k]); };
    if (M > FEW) {
        auto load = [&](int n, int k) {
            const int8_t* from = w + size_t(n) * K + k;
            _mm_prefetch((const char*)(from + 256), _MM_HINT_T0);
            __m512i v = K - k >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << (K - k)) - 1, from);
            return _mm512_xor_si512(v, _mm512_set1_epi8(-128));
        };
        return many_rows_8_bits(rows, scale, bias, y, N, threads, load);
    }
    auto tile = [&](auto R, int m, const int* n, float (*out)[NR]) {
        const int8_t* row[NR];
        for (int i = 0; i < NR; i++) row[i] = w + size_t(n[i]) * K;
        tile_int8<R()>(rows, m, row, out);
    };
    few_rows(rows, scale, bias, y, N, threads, tile, weight);
}

template <class T>
static void linear_int4(
    const T* x, const uint8_t* w, const int8_t* steps, const float* scale, const T* bias, T* y, int M, int N, int K,
    int threads) {
    const Rows rows = round_rows(x, M, K, threads);
    auto weight = [&](int n, int k) {
        int byte = w[size_t(n) * (K / 2) + k / 128 * 64 + k % 64];
        int number = k % 128 < 64 ? byte & 15 : byte >> 4;
        return float(int8_t((number - 8) * steps[size_t(n) * (K / GROUP) + k / GROUP]));
    };
    if (M > FEW / 2) { // each tile of few rows would unpack the weights again
        auto load = [&](int n, int k) {
            return spread(w + size_t(n) * (K / 2) + k / 128 * 64, steps[size_t(n) * (K / GROUP) + k / GROUP], k % 128);
        };
        return many_rows_8_bits(rows, scale, bias, y, N, threads, load);
    }
    auto tile = [&](auto R, int m, const int* n, float (*out)[NR]) {
        const uint8_t* row[NR];
        const int8_t* row_steps[NR];
        for (int i = 0; i < NR; i++) {
            row[i] = w + size_t(n[i]) * (K / 2);
            row_steps[i] = steps + size_t(n[i]) * (K / GROUP);
        }
        tile_int4<R()>(rows, m, row, row_steps, out);
    };
    few_rows(rows, scale, bias, y, N, threads, tile, weight);
}

// ---------------------------------------------------------------------------------------------- between the products

// y = table[x] * times, or table[x] without `times`. A bfloat16 is one of 65,536 numbers, so any function of one is a
// table, which the caller computes once. The results are equal to the bit, and looking one up takes a quarter of the
// time of computing it. (The table has one number more: each is read together with its neighbour.)
extern "C" void look_up_bf16(
    const bf16* table, const bf16* x, const bf16* times, bf16* y, int M, int K, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (M > 8)
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k += 16) {
            const size_t at = size_t(m) * K + k;
            const __mmask16 inside = first_of_16(K - k);
            const __m512i place = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, x + at));
            __m512 found = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_i32gather_epi32(place, table, 2), 16));
            if (times) found = _mm512_mul_ps(found, load16(inside, times + at));
            put16(inside, found, y + at);
        }
}

// Every row of x [M, K] divided by the root of its mean square and multiplied by 1 + weight [K]; float32 inside.
extern "C" void rms_norm_bf16(const bf16* x, const bf16* weight, bf16* y, float eps, int M, int K, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (M > 8)
    for (int m = 0; m < M; m++) {
        const bf16* row = x + size_t(m) * K;
        __m512 squares = _mm512_setzero_ps();
        for (int k = 0; k < K; k += 16) {
            const __m512 v = load16(first_of_16(K - k), row + k);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const __m512 inverse = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / K + eps));
        for (int k = 0; k < K; k += 16) {
            const __mmask16 inside = first_of_16(K - k);
            const __m512 factor = _mm512_add_ps(_mm512_set1_ps(1), load16(inside, weight + k));
            put16(inside, _mm512_mul_ps(_mm512_mul_ps(load16(inside, row + k), inverse), factor), y + size_t(m) * K + k);
        }
    }
}

// ---------------------------------------------------------------------------------------------- attention

// e to the power of x, for x <= 0: the whole part of the binary exponent separately, a polynomial for the rest.
// Relative error at most (4 + |x|) * 2^-23; NaN stays NaN.
static inline __m512 exp16(__m512 x) {
    const __m512 t = _mm512_max_ps(_mm512_set1_ps(-150), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(t, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f); // ln(2)^n / n!
    for (float next : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(next));
    return _mm512_scalef_ps(p, whole);
}

// cap * tanh(x / cap), by e = exp(-2 |x| / cap): (1 - e) / (1 + e) with the sign of x.
static inline __m512 capped16(__m512 x, float cap) {
    const __m512 one = _mm512_set1_ps(1), e = exp16(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2 / cap)));
    const __m512 size = _mm512_mul_ps(_mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e)), _mm512_set1_ps(cap));
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_sub_ps(size, below, _mm512_setzero_ps(), size);
}

static const int QUERIES = 48; // of a block; their scores stay in the CPU's cache

// y[b, s, h] = sum over t of softmax(scale * q[b, h, s] . k[b, h / G, t]) v[b, h / G, t], over the t that mask[b, s, t]
// allows, or over all without a mask; 0 if it allows none. q: B x H x S rows of E numbers; k, v: B x KV x T rows, KV =
// H / G.
//
// cap: scores go through cap * tanh(score / cap) first, unless it is 0.
//
// Both products are those of many rows, above. Keys and values are copied into panels once. Then blocks of queries use
// all panels; the G * S queries of one key head are neighbours. Attention weights are rounded to bfloat16 before they
// are multiplied with the values; the division by their sum comes at the end.
extern "C" void attention_bf16(
    const bf16* q, const bf16* k, const bf16* v, const uint8_t* mask, bf16* y, const Places* places, float scale,
    float cap, int B, int H, int KV, int S, int T, int E, int threads) {
    const int G = H / KV, pairs = (T + 1) / 2, deep = (E / 2 + 15) / 16 * 16; // steps of a panel of values, of keys
    const int key_panels = (T + WIDE - 1) / WIDE, value_panels = (E + WIDE - 1) / WIDE;
    const size_t of_head = (size_t(key_panels) * deep + size_t(value_panels) * pairs) * WIDE * 4;
    static thread_local Buffer of_panels;
    char* const all_panels = (char*)of_panels.of(B * KV * of_head);
    auto key_panel = [&](int head, int i) { return all_panels + head * of_head + size_t(i) * deep * WIDE * 4; };
    auto value_panel = [&](int head, int i) { return key_panel(head, key_panels) + size_t(i) * pairs * WIDE * 4; };

    const int panels = key_panels + value_panels, blocks = (G * S + QUERIES - 1) / QUERIES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int task = 0; task < B * KV * panels; task++) {
        const int head = task / panels, i = task % panels, first = (i - key_panels) * WIDE;
        const bf16* keys = k + head / KV * places->k[0] + head % KV * places->k[1];
        const bf16* values = v + head / KV * places->v[0] + head % KV * places->v[1];
        if (i < key_panels) {
            auto load = [&](int t, int step) { return load32(E - 2 * step, keys + t * places->k[2] + 2 * step); };
            copy_panel(key_panel(head, i), i * WIDE, T, 0, deep, load);
            continue;
        }
        for (int pair = 0; pair < pairs; pair++) // two consecutive values belong to one piece
            for (int n = 0; n < WIDE; n += 16) {
                const __mmask16 inside = first_of_16(E - first - n);
                const bf16* from = values + 2 * pair * places->v[2] + first + n;
                const __mmask16 odd = 2 * pair + 1 < T ? inside : 0;
                const __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, from));
                const __m512i other = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + places->v[2]));
                char* to = value_panel(head, i - key_panels) + (size_t(pair) * WIDE + n) * 4;
                _mm512_store_si512(to, _mm512_or_si512(one, _mm512_slli_epi32(other, 16)));
            }
    }

#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int task = 0; task < B * KV * blocks; task++) {
        static thread_local Buffer of_queries, of_scores, of_weights, of_sums;
        const int head = task / blocks, b = head / KV, begin = task % blocks * QUERIES;
        const int count = std::min(QUERIES, G * S - begin);
        bf16* queries = (bf16*)of_queries.of(size_t(QUERIES) * E * sizeof(bf16));
        float* scores = (float*)of_scores.of(size_t(key_panels) * QUERIES * WIDE * 4); // [key_panels, QUERIES, WIDE]
        bf16* weights = (bf16*)of_weights.of(size_t(QUERIES) * key_panels * WIDE * sizeof(bf16));
        float* sums = (float*)of_sums.of(size_t(QUERIES) * WIDE * 4);
        float inverse[QUERIES];
        auto h_of = [&](int m) { return head % KV * G + (begin + m) / S; };
        auto s_of = [&](int m) { return (begin + m) % S; };

        for (int m = 0; m < count; m++)
            std::copy_n(q + b * places->q[0] + h_of(m) * places->q[1] + s_of(m) * places->q[2], E, queries + m * E);
        std::fill_n(scores, size_t(key_panels) * QUERIES * WIDE, 0);
        for (int i = 0; i < key_panels; i++)
            tiles_of_rows(count, [&](auto R, int m) {
                int32_t* to = (int32_t*)scores + (size_t(i) * QUERIES + m) * WIDE;
                parts_of_panel(T - i * WIDE, [&](auto C) {
                    tile_of_panel<__m512, R(), C()>((char*)(queries + m * E), 2 * E, key_panel(head, i), E / 2, to);
                });
            });

        for (int m = 0; m < count; m++) {
            const uint8_t* seen = mask ? mask + b * places->mask[0] + s_of(m) * places->mask[1] : nullptr;
            auto of_16 = [&](int t) {
                const __mmask16 inside = first_of_16(T - t);
                if (!seen) return inside;
                return (__mmask16)_mm_test_epi8_mask(_mm_maskz_loadu_epi8(inside, seen + t), _mm_set1_epi8(-1));
            };
            auto score = [&](int t) { return scores + (size_t(t / WIDE) * QUERIES + m) * WIDE + t % WIDE; };
            __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (int t = 0; t < T; t += 16) {
                __m512 scaled = _mm512_mul_ps(_mm512_load_ps(score(t)), _mm512_set1_ps(scale));
                if (cap) scaled = capped16(scaled, cap);
                _mm512_store_ps(score(t), scaled);
                largest = _mm512_mask_max_ps(largest, of_16(t), largest, scaled);
            }
            largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
            for (int t = 0; t < T; t += 16) {
                const __m512 weight = _mm512_maskz_mov_ps(of_16(t), exp16(_mm512_sub_ps(_mm512_load_ps(score(t)), largest)));
                sum = _mm512_add_ps(sum, weight);
                put16(0xffff, weight, weights + size_t(m) * key_panels * WIDE + t);
            }
            const float total = _mm512_reduce_add_ps(sum);
            inverse[m] = total != 0 ? 1 / total : 0;
        }

        for (int i = 0; i < value_panels; i++) {
            std::fill_n(sums, size_t(QUERIES) * WIDE, 0);
            tiles_of_rows(count, [&](auto R, int m) {
                const size_t stride = size_t(key_panels) * WIDE;
                int32_t* to = (int32_t*)sums + size_t(m) * WIDE;
                parts_of_panel(E - i * WIDE, [&](auto C) {
                    const char* from = (const char*)(weights + m * stride);
                    tile_of_panel<__m512, R(), C()>(from, 2 * stride, value_panel(head, i), pairs, to);
                });
            });
            for (int m = 0; m < count; m++)
                for (int n = 0; n < WIDE; n += 16) {
                    bf16* to = y + ((size_t(b) * S + s_of(m)) * H + h_of(m)) * E + i * WIDE + n;
                    const __m512 mean = _mm512_mul_ps(_mm512_load_ps(sums + m * WIDE + n), _mm512_set1_ps(inverse[m]));
                    put16(first_of_16(E - i * WIDE - n), mean, to);
                }
        }
    }
}

#include "decoder_layer.h"

// One layer of the decoder for the next tokens of cached rows, in one call.
//
// Between the seven matrix products of a token there are some thirty small steps. Started from Python, each takes about
// ten microseconds, however little it computes; together they take as long as the output head. Here are the same steps
// in the same order, that of `GemmaDecoderLayer` and `Gemma2DecoderLayer`. They call the functions of the other files,
// so the results are equal to the bit.

#pragma once

struct Linear { // bfloat16 if there is no scale, 8 bits if there are no steps, else 4 bits; no bias
    const void* weight;
    const int8_t* steps;
    const float* scale;
    int N, K;
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const bf16 *before_attention, *after_attention, *before_mlp, *after_mlp; // norms; Gemma 1 has only those before
    float eps, scale, cap; // eps of norms, scale and cap of attention
    int heads, key_heads, head_dim;
};

static void apply(const Linear& l, const bf16* x, bf16* y, int M, int threads) {
    if (l.steps) linear_int4_bf16(x, (const uint8_t*)l.weight, l.steps, l.scale, nullptr, y, M, l.N, l.K, threads);
    else if (l.scale) linear_int8_bf16(x, (const int8_t*)l.weight, l.scale, nullptr, y, M, l.N, l.K, threads);
    else linear_bf16(x, (const bf16*)l.weight, nullptr, y, M, l.N, l.K, threads);
}

static void add(const bf16* a, const bf16* b, bf16* y, size_t count) {
#pragma omp simd
    for (size_t i = 0; i < count; i++) put(number(a[i]) + number(b[i]), y + i);
}

// x, y: [B, S, D]. cos, sin: [B, S, E / 2]. mask: [B, S, T]. keys, values: the layer's part of the cache, with T
// columns in use, of which the last S are written here. gelu: the table for `look_up_bf16`. places: of keys, values and
// mask.
extern "C" void decoder_layer(
    const Layer* layer, const bf16* gelu, const bf16* x, const bf16* cos, const bf16* sin, const uint8_t* mask,
    bf16* keys, bf16* values, bf16* y, const Places* places, int B, int S, int T, int threads) {
    const Layer& l = *layer;
    const int M = B * S, D = l.q.K, H = l.heads, KV = l.key_heads, E = l.head_dim, wide = l.gate.N;
    typedef std::vector<bf16> Numbers;
    Numbers normed(size_t(M) * D), part(normed), sum(normed);
    auto norm = [&](const Numbers& from, const bf16* weight, Numbers& to) {
        rms_norm_bf16(from.data(), weight, to.data(), l.eps, M, D, threads);
    };

    rms_norm_bf16(x, l.before_attention, normed.data(), l.eps, M, D, threads);
    Numbers q(size_t(M) * H * E), rotated(q), k(size_t(M) * KV * E), rotated_k(k), v(k);
    apply(l.q, normed.data(), q.data(), M, threads); // [B, S, H, E]
    apply(l.k, normed.data(), k.data(), M, threads); // [B, S, KV, E]
    apply(l.v, normed.data(), v.data(), M, threads);
    const int64_t of_q[3] = {int64_t(S) * H * E, E, int64_t(H) * E}, of_k[3] = {int64_t(S) * KV * E, E, int64_t(KV) * E};
    rotary_bf16(q.data(), cos, sin, rotated.data(), of_q, B, H, S, E, threads);    // [B, H, S, E]
    rotary_bf16(k.data(), cos, sin, rotated_k.data(), of_k, B, KV, S, E, threads); // [B, KV, S, E]
    for (int b = 0; b < B; b++)
        for (int head = 0; head < KV; head++)
            for (int s = 0; s < S; s++) {
                const bf16* key = &rotated_k[((size_t(b) * KV + head) * S + s) * E];
                const bf16* value = &v[((size_t(b) * S + s) * KV + head) * E];
                const int64_t column = T - S + s;
                std::copy_n(key, E, keys + b * places->k[0] + head * places->k[1] + column * places->k[2]);
                std::copy_n(value, E, values + b * places->v[0] + head * places->v[1] + column * places->v[2]);
            }

    Numbers& attended = q; // [B, S, H, E]
    Places all = *places;
    all.q[0] = int64_t(H) * S * E, all.q[1] = int64_t(S) * E, all.q[2] = E;
    attention_bf16(
        rotated.data(), keys, values, mask, attended.data(), &all, l.scale, l.cap, B, H, KV, S, T, E, threads);
    apply(l.o, attended.data(), part.data(), M, threads);
    if (l.after_attention) norm(part, l.after_attention, part);
    add(x, part.data(), sum.data(), sum.size());

    norm(sum, l.before_mlp, normed);
    Numbers gate(size_t(M) * wide), up(gate);
    apply(l.gate, normed.data(), gate.data(), M, threads);
    apply(l.up, normed.data(), up.data(), M, threads);
    look_up_bf16(gelu, gate.data(), up.data(), gate.data(), M, wide, threads);
    apply(l.down, gate.data(), part.data(), M, threads);
    if (l.after_mlp) norm(part, l.after_mlp, part);
    add(sum.data(), part.data(), y, sum.size());
}

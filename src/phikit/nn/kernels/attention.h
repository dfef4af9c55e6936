// Attention over a paged cache, and writing to it.
//
// A token's keys are taken in chunks of one size, each with its own softmax, and the chunks are
// merged in order (Milakov & Gimelshein, arXiv 1805.02867; the split is that of Flash-Decoding).
// Chunks may run on different threads: the result is the same to the last bit. Query heads that
// share a key head read its keys once, four at a time.

#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

constexpr int64_t CHUNK = 128;       // keys with a softmax of their own
constexpr int64_t VALUE_KEYS = 32;   // values that stay in the nearest cache between passes
constexpr int64_t AHEAD_KEYS = 8;    // how early a key is asked for
constexpr int64_t HEADS = 4;         // query heads that share one pass over the keys
constexpr int64_t PARALLEL_SCORES = 1024;

// One layer of the cache. `keys` and `values` are [blocks, block_tokens, kv_heads, width]; scales,
// of an int8 cache alone, [blocks, block_tokens, kv_heads].
template <class C> struct Cache {
    C* keys;
    C* values;
    float* key_scales;
    float* value_scales;
    int64_t block_tokens, kv_heads, width;
};

// --- Writing ------------------------------------------------------------------------------------

template <class T> void store_head(const T* from, T* to, float*, int64_t width) {
    std::memcpy(to, from, width * sizeof(T));
}

template <class T> void store_head(const T* from, int8_t* to, float* scale, int64_t width) {
    f32x16 peak = {};
    for (int64_t i = 0; i < width; i += LANES)
        peak = larger(magnitude(load(from + i, width - i)), peak);
    *scale = largest(peak) / 127;
    float divisor = *scale > 0 ? *scale : 1;
    for (int64_t i = 0; i < width; i += LANES) {
        i32x16 rounded = nearest(load(from + i, width - i) / divisor);
        for (int64_t j = i; j < std::min(i + LANES, width); j++) to[j] = int8_t(rounded[j - i]);
    }
}

// Keys and values [tokens, kv_heads, width] into the slots block * block_tokens + offset.
template <class T, class C>
void store_tokens(const T* k, const T* v, Cache<C> cache, const int64_t* slots, int64_t tokens,
                  int threads) {
    int64_t heads = cache.kv_heads, width = cache.width;
#pragma omp parallel for num_threads(threads) if (tokens * heads * width > 65536)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < heads; h++) {
            int64_t to = slots[t] * heads + h, from = (t * heads + h) * width;
            store_head(k + from, cache.keys + to * width, cache.key_scales + to, width);
            store_head(v + from, cache.values + to * width, cache.value_scales + to, width);
        }
    }
}

// --- Reading ------------------------------------------------------------------------------------

// The softmax of some keys, not yet divided: the largest score, the sum of exp(score - largest),
// and that sum's weighted values.
struct Partial {
    float* at;  // [2 + width]
    float& peak() { return at[0]; }
    float& total() { return at[1]; }
    float* values() { return at + 2; }
};

// Adds `more`, the next chunk of the same query.
inline void merge(Partial into, Partial more, int64_t width) {
    float peak = std::max(into.peak(), more.peak());
    float before = std::exp(into.peak() - peak), after = std::exp(more.peak() - peak);
    into.total() = into.total() * before + more.total() * after;
    for (int64_t i = 0; i < width; i++)
        into.values()[i] = into.values()[i] * before + more.values()[i] * after;
    into.peak() = peak;
}

// Asks for a row that will be read: rows lie too far apart for the processor to guess the next.
template <class C> inline void fetch(const C* row, int64_t width) {
    for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(C))) __builtin_prefetch(row + i);
}

// Up to CHUNK keys of one sequence and key head, for G query heads.
template <class C, int G>
void attend_heads(const float* q, const Cache<C>& cache, const int64_t* places, int64_t count,
                  float* partials) {
    int64_t width = cache.width, padded = (width + LANES - 1) / LANES * LANES;
    float weights[G][CHUNK];
    for (int64_t n = 0; n < count; n++) {
        const C* key = cache.keys + places[n] * width;
        fetch(cache.keys + places[std::min(n + AHEAD_KEYS, count - 1)] * width, width);
        fetch(cache.values + places[n] * width, width);
        f32x16 sums[G] = {};
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 part = load(key + i, width - i);
            for (int g = 0; g < G; g++) sums[g] += load(q + g * padded + i) * part;
        }
        float scale = cache.key_scales ? cache.key_scales[places[n]] : 1.0f;
        for (int g = 0; g < G; g++) weights[g][n] = sum(sums[g]) * scale;
    }
    int64_t filled = (count + LANES - 1) / LANES * LANES;
    for (int g = 0; g < G; g++) {
        float* w = weights[g];
        std::fill(w + count, w + filled, -INFINITY);
        f32x16 peaks = load(w);
        for (int64_t n = LANES; n < filled; n += LANES) peaks = larger(peaks, load(w + n));
        Partial partial{partials + g * (2 + width)};
        partial.peak() = largest(peaks);
        f32x16 totals = {};
        for (int64_t n = 0; n < filled; n += LANES) {
            f32x16 share = exp(load(w + n) - partial.peak());
            totals += share;
            store(w + n, share);
        }
        partial.total() = sum(totals);
        std::fill(partial.values(), partial.values() + width, 0.0f);
        if (cache.value_scales)
            for (int64_t n = 0; n < count; n++) w[n] *= cache.value_scales[places[n]];
    }
    for (int64_t first = 0; first < count; first += VALUE_KEYS) {
        int64_t last = std::min(first + VALUE_KEYS, count);
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 sums[G];
            for (int g = 0; g < G; g++)
                sums[g] = load(partials + g * (2 + width) + 2 + i, width - i);
            for (int64_t n = first; n < last; n++) {
                f32x16 part = load(cache.values + places[n] * width + i, width - i);
                for (int g = 0; g < G; g++) sums[g] += weights[g][n] * part;
            }
            for (int g = 0; g < G; g++)
                store(partials + g * (2 + width) + 2 + i, sums[g], width - i);
        }
    }
}

template <class C, int G = HEADS>
void attend_some(int64_t heads, const float* q, const Cache<C>& cache, const int64_t* places,
                 int64_t count, float* partials) {
    if constexpr (G > 1)
        if (heads < G) return attend_some<C, G - 1>(heads, q, cache, places, count, partials);
    attend_heads<C, G>(q, cache, places, count, partials);
}

template <class T> struct Queries {
    const T* q;  // [tokens, heads, width]
    T* out;
    const int32_t* tables;  // [rows, blocks of a row]
    const int32_t* rows;    // [tokens]
    const int32_t* lengths;
    int64_t tokens, heads, blocks, window;  // a window that hides nothing is INT32_MAX

    int64_t first_key(int64_t token) const {
        return std::max<int64_t>(0, lengths[token] - window);
    }
    int64_t chunks(int64_t token) const {
        return (lengths[token] - first_key(token) + CHUNK - 1) / CHUNK;
    }
};

// Chunk `chunk` of one token and key head; `partials` are [heads of the group, 2 + width].
template <class T, class C>
void attend_chunk(const Queries<T>& in, const Cache<C>& cache, int64_t token, int64_t kv_head,
                  int64_t chunk, float* partials) {
    int64_t width = cache.width, padded = (width + LANES - 1) / LANES * LANES;
    int64_t group = in.heads / cache.kv_heads, block = cache.block_tokens;
    int64_t first = in.first_key(token) + chunk * CHUNK;
    int64_t count = std::min<int64_t>(CHUNK, in.lengths[token] - first);
    const int32_t* table = in.tables + in.rows[token] * in.blocks;
    int64_t places[CHUNK];
    for (int64_t n = 0; n < count; n++) {
        int64_t slot = int64_t(table[(first + n) / block]) * block + (first + n) % block;
        places[n] = slot * cache.kv_heads + kv_head;
    }
    thread_local std::vector<float> scaled;
    scaled.resize(HEADS * padded);
    const float scale = 1.0f / std::sqrt(float(width));
    for (int64_t g = 0; g < group; g += HEADS) {
        int64_t some = std::min(HEADS, group - g);
        for (int64_t h = 0; h < some; h++) {
            const T* q = in.q + (token * in.heads + kv_head * group + g + h) * width;
            for (int64_t i = 0; i < width; i += LANES)
                store(&scaled[h * padded + i], load(q + i, width - i) * scale);
        }
        attend_some(some, scaled.data(), cache, places, count, partials + g * (2 + width));
    }
}

// Divides by the total and writes the group's heads.
template <class T>
void finish(const Queries<T>& in, int64_t token, int64_t kv_head, int64_t group, int64_t width,
            float* partials) {
    for (int64_t g = 0; g < group; g++) {
        Partial partial{partials + g * (2 + width)};
        T* out = in.out + (token * in.heads + kv_head * group + g) * width;
        for (int64_t i = 0; i < width; i += LANES)
            store(out + i, load(partial.values() + i, width - i) / partial.total(), width - i);
    }
}

template <class T, class C>
void paged_attention(const Queries<T>& in, const Cache<C>& cache, int threads) {
    int64_t width = cache.width, kv_heads = cache.kv_heads, group = in.heads / kv_heads;
    int64_t size = group * (2 + width), pairs = in.tokens * kv_heads;
    int64_t most = 0, keys = 0;
    for (int64_t t = 0; t < in.tokens; t++) {
        most = std::max(most, in.chunks(t));
        keys += in.lengths[t] - in.first_key(t);
    }
    bool alone = keys * in.heads < PARALLEL_SCORES;
    // Few pairs and long sequences: every chunk is a task of its own.
    int64_t parts = pairs < 4 * threads && !alone ? most : 1;
    static thread_local std::vector<float> kept;
    kept.resize(pairs * parts * size);
    float* partials = kept.data();
#pragma omp parallel num_threads(threads) if (!alone)
    {
        std::vector<float> next(size);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pairs * parts; task++) {
            int64_t pair = task / parts, part = task % parts;
            int64_t token = pair / kv_heads, kv_head = pair % kv_heads;
            float* own = partials + task * size;
            if (part < in.chunks(token)) attend_chunk(in, cache, token, kv_head, part, own);
            for (int64_t chunk = 1; parts == 1 && chunk < in.chunks(token); chunk++) {
                attend_chunk(in, cache, token, kv_head, chunk, next.data());
                for (int64_t at = 0; at < size; at += 2 + width)
                    merge({own + at}, {next.data() + at}, width);
            }
        }
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++) {
            int64_t token = pair / kv_heads;
            float* own = partials + pair * parts * size;
            for (int64_t part = 1; part < std::min(parts, in.chunks(token)); part++)
                for (int64_t at = 0; at < size; at += 2 + width)
                    merge({own + at}, {own + part * size + at}, width);
            finish(in, token, pair % kv_heads, group, width, own);
        }
    }
}

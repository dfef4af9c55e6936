// Norm, rotation, sum and gate: one pass over a row each, float32 inside.

#pragma once

#include "simd.h"

constexpr int64_t PARALLEL_ELEMENTS = 32768;  // below, waking a thread costs more than it saves

template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * width;
        f32x16 squares = {}, more = {};
        for (int64_t i = 0; i < width; i += 2 * LANES) {
            f32x16 a = load(from + i, width - i);
            squares += a * a;
            if (i + LANES < width) {
                f32x16 b = load(from + i + LANES, width - i - LANES);
                more += b * b;
            }
        }
        float scale = 1.0f / std::sqrt(sum(squares + more) / width + eps);
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 unit = load(from + i, width - i) * scale;
            store(out + row * width + i, unit * load(weight + i, width - i), width - i);
        }
    }
}

// The heads of one token: channels (i, i + half) turned by the angle of i, the rest copied.
template <class T>
void turn(const T* x, T* out, int64_t heads, int64_t width, const T* cos, const T* sin,
          int64_t half) {
    for (int64_t head = 0; head < heads; head++, x += width, out += width) {
        for (int64_t i = 0; i < half; i += LANES) {
            int64_t left = half - i;
            f32x16 a = load(x + i, left), b = load(x + half + i, left);
            f32x16 c = load(cos + i, left), s = load(sin + i, left);
            store(out + i, a * c - b * s, left);
            store(out + half + i, b * c + a * s, left);
        }
        std::memcpy(out + 2 * half, x + 2 * half, (width - 2 * half) * sizeof(T));
    }
}

// Each token of `x` holds queries, keys, values (heads of one width); queries and keys are turned.
// Token t has row t % angles of the tables.
template <class T>
void split_rotate(const T* x, T* q, T* k, T* v, int64_t tokens, int64_t heads, int64_t kv_heads,
                  int64_t width, const T* cos, const T* sin, int64_t angles, int64_t half,
                  int threads) {
    int64_t q_size = heads * width, kv_size = kv_heads * width, size = q_size + 2 * kv_size;
#pragma omp parallel for num_threads(threads) if (tokens * size > PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        const T* from = x + t * size;
        const T *c = cos + t % angles * half, *s = sin + t % angles * half;
        turn(from, q + t * q_size, heads, width, c, s, half);
        turn(from + q_size, k + t * kv_size, kv_heads, width, c, s, half);
        if (kv_size > 0) std::memcpy(v + t * kv_size, from + q_size + kv_size, kv_size * sizeof(T));
    }
}

template <class T> void add(const T* a, const T* b, T* out, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) if (count > PARALLEL_ELEMENTS)
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t left = count - i;
        store(out + i, load(a + i, left) + load(b + i, left), left);
    }
}

template <class T>
void gated_silu(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > PARALLEL_ELEMENTS / 2)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + 2 * row * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 z = load(gate + i, width - i);
            f32x16 silu = z / (1.0f + exp(-z));
            store(out + row * width + i, silu * load(up + i, width - i), width - i);
        }
    }
}

// y = x W^T + b for a few rows of x, W as torch keeps it. What counts is to read W once, at the
// speed of memory. A row's sums run in one order whatever the number of rows, so its result does
// not depend on its neighbours.

#pragma once

#include "simd.h"

constexpr int64_t OUTPUTS = 4;                 // rows of W that one pass over x serves
constexpr int64_t PARALLEL_PRODUCTS = 65536;

// What one step of a dot product reads: 64 bytes, 16 floats or 32 bfloat16 in pairs.
template <class T> struct Strip;
template <> struct Strip<float> {
    typedef f32x16 type;
};
template <> struct Strip<bf16> {
    typedef u32x16 type;
};

// Bfloat16 widens to float by its position alone; AVX-512's own bfloat16 product, measured, is no
// faster, and rounds more.
inline f32x16 add_products(f32x16 sums, f32x16 a, f32x16 b) { return sums + a * b; }

inline f32x16 add_products(f32x16 sums, u32x16 a, u32x16 b) {
    sums += (f32x16)(a << 16) * (f32x16)(b << 16);
    return sums + (f32x16)(a & 0xffff0000) * (f32x16)(b & 0xffff0000);
}

// `OUT` outputs of `ROWS` rows.
template <class T, int ROWS, int OUT>
void dot_tile(const T* x, const T* weight, const T* bias, T* y, int64_t width, int64_t outputs) {
    typedef typename Strip<T>::type Vector;
    constexpr int64_t STEP = sizeof(Vector) / sizeof(T);
    f32x16 sums[ROWS][OUT] = {};
    int64_t i = 0;
    for (; i + STEP <= width; i += STEP) {
        Vector w[OUT];
        for (int o = 0; o < OUT; o++) {
            w[o] = read<Vector>(weight + o * width + i);
            __builtin_prefetch(weight + (OUT + o) * width + i);  // of the next tile
        }
        for (int r = 0; r < ROWS; r++) {
            Vector a = read<Vector>(x + r * width + i);
            for (int o = 0; o < OUT; o++) sums[r][o] = add_products(sums[r][o], a, w[o]);
        }
    }
    if (i < width) {
        T rest_x[STEP] = {}, rest_w[STEP] = {};
        for (int r = 0; r < ROWS; r++) {
            std::memcpy(rest_x, x + r * width + i, (width - i) * sizeof(T));
            for (int o = 0; o < OUT; o++) {
                std::memcpy(rest_w, weight + o * width + i, (width - i) * sizeof(T));
                sums[r][o] = add_products(sums[r][o], read<Vector>(rest_x), read<Vector>(rest_w));
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        f32x16 found = {};
        for (int o = 0; o < OUT; o++) found[o] = sum(sums[r][o]);
        if (bias) found += load(bias, OUT);
        store(y + r * outputs, found, OUT);
    }
}

// As many rows at a time as registers allow; `weight` stays in the cache between passes.
template <class T, int OUT>
void dot_rows(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t width,
              int64_t outputs) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        dot_tile<T, 4, OUT>(x + r * width, weight, bias, y + r * outputs, width, outputs);
    for (; r + 2 <= rows; r += 2)
        dot_tile<T, 2, OUT>(x + r * width, weight, bias, y + r * outputs, width, outputs);
    if (r < rows) dot_tile<T, 1, OUT>(x + r * width, weight, bias, y + r * outputs, width, outputs);
}

template <class T>
void linear(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t width,
            int64_t outputs, int threads) {
    int64_t tiles = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (rows * width * outputs > PARALLEL_PRODUCTS)
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t first = tile * OUTPUTS, last = first + OUTPUTS;
        if (last <= outputs) {
            dot_rows<T, OUTPUTS>(x, weight + first * width, bias ? bias + first : nullptr,
                                 y + first, rows, width, outputs);
            continue;
        }
        for (int64_t o = first; o < outputs; o++)
            dot_rows<T, 1>(x, weight + o * width, bias ? bias + o : nullptr, y + o, rows, width,
                           outputs);
    }
}

// Packed weights: int4 or int8 in panels of 16 output rows, one bfloat16 scale per row and group.
//
// A panel's group is a run of 64-byte vectors. A vector's 32-bit lane r belongs to output row r and
// holds the next columns of that row, pair by pair: with 8 bits, 16-bit word p of the lane has
// column p in its low byte and column 2 + p in its high byte; with 4 bits, word p has column
// 2 j + p in nibble j, stored as q + 8.
//
// With VNNI, activations are rounded to 16 bits under one scale per row and group. One instruction
// then multiplies a pair of columns of 16 output rows by a pair of activations and adds to 16
// sums; the sums of a group are exact, so a row's result does not depend on its neighbours.

#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

constexpr int64_t PANEL = 16;
constexpr int64_t STRIP = 32;  // columns of one step; groups are multiples of it
constexpr int64_t TILE = 8;    // rows of x that share one decoding of the weights

// --- Decoding -----------------------------------------------------------------------------------

template <int BITS> constexpr int PAIRS = 16 / BITS;  // pairs of columns in a vector

// Pair `j` of every lane as 16-bit integers: -127..127 of 8 bits, 0..15 (q + 8) of 4.
template <int BITS> inline i16x32 pair_of_columns(u16x32 words, int j) {
    if (BITS == 8) return (i16x32)(j == 0 ? words << 8 : words) >> 8;
    if (j == 3) return (i16x32)(words >> 12);
    return (i16x32)((words >> (4 * j)) & 15);
}

// --- Products -----------------------------------------------------------------------------------

// Rows of activations, ready to meet the weights. Rows come in tiles of up to TILE; a tile of n rows
// is [strips, n, STRIP] numbers, so that what a step needs lies together.
struct Activations {
#ifdef PHIKIT_VNNI
    std::vector<int16_t> values;
    std::vector<float> scales;     // tiles of [groups, n]
    std::vector<int32_t> offsets;  // the same: what q + 8 in place of q adds to a group, negated
#else
    std::vector<float> values;
#endif
    int64_t rows, width, group, groups;

    void resize() {
        values.resize(rows * width);
#ifdef PHIKIT_VNNI
        scales.resize(rows * groups);
        offsets.resize(rows * groups);
#endif
    }
    // Rows in the tile of `row`, which is also how far the parts of a row lie from each other.
    int64_t rows_beside(int64_t row) const { return std::min(TILE, rows - row / TILE * TILE); }
    // Where the first of the row's `parts` lies; each has `size` numbers.
    int64_t place(int64_t row, int64_t parts, int64_t size) const {
        return (row / TILE * TILE * parts + row % TILE) * size;
    }
};

// Panels that are read side by side and share the reading of the activations.
#ifdef PHIKIT_VNNI
constexpr int ABREAST = 2;
#else
constexpr int ABREAST = 1;
#endif

struct Panels {
    const uint8_t* packed[ABREAST];
    const bf16* scales[ABREAST];
};

#ifdef PHIKIT_VNNI

// The largest integer whose products with a group of weights still sum within 32 bits.
inline float largest_activation(int64_t group) {
    return std::min<int64_t>(INT16_MAX, INT32_MAX / (128 * group));
}

template <int BITS, class T> void prepare(Activations& to, const T* from, int64_t row) {
    const float top = largest_activation(to.group);
    const int64_t beside = to.rows_beside(row);
    int16_t* values = to.values.data() + to.place(row, to.width / STRIP, STRIP);
    float* scales = to.scales.data() + to.place(row, to.groups, 1);
    int32_t* offsets = to.offsets.data() + to.place(row, to.groups, 1);
    for (int64_t g = 0; g < to.groups; g++, scales += beside, offsets += beside) {
        u32x16 peaks = {};  // the bits of magnitudes, which are in order, NaN above all
        for (int64_t i = 0; i < to.group; i += LANES) {
            u32x16 found = (u32x16)load(from + i) & 0x7fffffff;
            peaks = found > peaks ? found : peaks;
        }
        uint32_t peak = _mm512_reduce_max_epu32((__m512i)peaks);
        *scales = read<float>(&peak) / top;
        const float inverse = *scales > 0 ? 1 / *scales : 0;
        i32x16 totals = {};
        for (int64_t i = 0; i < to.group; i += STRIP, from += STRIP, values += beside * STRIP) {
            for (int64_t half = 0; half < STRIP; half += LANES) {
                i32x16 rounded = nearest(load(from + half) * inverse);
                totals += rounded;
                write(values + half, (u16x16)_mm512_cvtepi32_epi16((__m512i)rounded));
            }
        }
        *offsets = BITS == 4 ? -8 * _mm512_reduce_add_epi32((__m512i)totals) : 0;
    }
}

// 16 outputs of each of ABREAST panels, for a tile of `ROWS` rows of activations.
template <int BITS, int ROWS>
void multiply(const Activations& x, int64_t row, Panels at, f32x16* out) {
    const int16_t* values = x.values.data() + row * x.width;
    const float* x_scales = x.scales.data() + row * x.groups;
    const int32_t* offsets = x.offsets.data() + row * x.groups;
    f32x16 outputs[ROWS][ABREAST] = {};
    for (int64_t g = 0; g < x.groups; g++, x_scales += ROWS, offsets += ROWS) {
        __m512i sums[ROWS][ABREAST];
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < ABREAST; p++) sums[r][p] = _mm512_set1_epi32(offsets[r]);
        for (int64_t i = 0; i < x.group; i += STRIP, values += ROWS * STRIP) {
            for (int pair = 0; pair < STRIP / 2; pair += PAIRS<BITS>) {
                u16x32 words[ABREAST];
                for (int p = 0; p < ABREAST; p++) {
                    words[p] = read_ahead<u16x32>(at.packed[p]);
                    at.packed[p] += 64;
                }
                for (int j = 0; j < PAIRS<BITS>; j++) {
                    for (int r = 0; r < ROWS; r++) {
                        const int16_t* two = values + r * STRIP + 2 * (pair + j);
                        __m512i both = _mm512_set1_epi32(read<int32_t>(two));
                        for (int p = 0; p < ABREAST; p++) {
                            __m512i columns = (__m512i)pair_of_columns<BITS>(words[p], j);
                            sums[r][p] = _mm512_dpwssd_epi32(sums[r][p], columns, both);
                        }
                    }
                }
            }
        }
        for (int p = 0; p < ABREAST; p++) {
            f32x16 scale = load(at.scales[p] + g * PANEL);
            for (int r = 0; r < ROWS; r++) {
                f32x16 exact = __builtin_convertvector((i32x16)sums[r][p], f32x16);
                outputs[r][p] += exact * (scale * x_scales[r]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < ABREAST; p++) out[r * ABREAST + p] = outputs[r][p];
}

#else

template <int BITS, class T> void prepare(Activations& to, const T* from, int64_t row) {
    float* values = to.values.data() + to.place(row, to.width / STRIP, STRIP);
    for (int64_t i = 0; i < to.width; i += STRIP, values += to.rows_beside(row) * STRIP)
        for (int64_t half = 0; half < STRIP; half += LANES)
            write(values + half, load(from + i + half));
}

template <int BITS, int ROWS>
void multiply(const Activations& x, int64_t row, Panels at, f32x16* out) {
    const float* values = x.values.data() + row * x.width;
    const uint8_t* packed = at.packed[0];
    for (int r = 0; r < ROWS; r++) out[r] = f32x16{};
    for (int64_t g = 0; g < x.groups; g++) {
        f32x16 sums[ROWS] = {};
        for (int64_t i = 0; i < x.group; i += STRIP, values += ROWS * STRIP) {
            for (int pair = 0; pair < STRIP / 2; pair += PAIRS<BITS>, packed += 64) {
                u16x32 words = read_ahead<u16x32>(packed);
                for (int j = 0; j < PAIRS<BITS>; j++) {
                    i32x16 both = (i32x16)(pair_of_columns<BITS>(words, j) - (BITS == 4 ? 8 : 0));
                    f32x16 even = __builtin_convertvector((i32x16)((u32x16)both << 16) >> 16, f32x16);
                    f32x16 odd = __builtin_convertvector(both >> 16, f32x16);
                    for (int r = 0; r < ROWS; r++) {
                        const float* two = values + r * STRIP + 2 * (pair + j);
                        sums[r] += even * two[0];
                        sums[r] += odd * two[1];
                    }
                }
            }
        }
        f32x16 scale = load(at.scales[0] + g * PANEL);
        for (int r = 0; r < ROWS; r++) out[r] += sums[r] * scale;
    }
}

#endif

// `multiply` for a number of rows known only now.
template <int BITS, int ROWS = TILE>
void multiply_rows(int64_t rows, const Activations& x, int64_t row, Panels at, f32x16* out) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return multiply_rows<BITS, ROWS - 1>(rows, x, row, at, out);
    multiply<BITS, ROWS>(x, row, at, out);
}

template <int BITS, class T>
void packed_linear(const T* x, const uint8_t* packed, const bf16* scales, const T* bias, T* y,
                   int64_t rows, int64_t width, int64_t outputs, int64_t group, int threads) {
    static thread_local Activations prepared;  // keeps its memory from call to call
    Activations& a = prepared;                 // by its address, the other threads see this one
    a.rows = rows, a.width = width, a.group = group, a.groups = width / group;
    a.resize();
    int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (int64_t row = 0; row < rows; row++) prepare<BITS>(a, x + row * width, row);
#pragma omp parallel for schedule(static) num_threads(threads) if (panels * width > 8192)
    for (int64_t panel = 0; panel < panels; panel += ABREAST) {
        Panels at;
        for (int64_t p = 0; p < ABREAST; p++) {
            int64_t existing = std::min(panel + p, panels - 1);
            at.packed[p] = packed + existing * width * (PANEL * BITS / 8);
            at.scales[p] = scales + existing * a.groups * PANEL;
        }
        for (int64_t row = 0; row < rows; row += TILE) {
            int64_t some = std::min(TILE, rows - row);
            f32x16 out[TILE * ABREAST];
            multiply_rows<BITS>(some, a, row, at, out);
            for (int64_t i = 0; i < some * ABREAST; i++) {
                int64_t first = (panel + i % ABREAST) * PANEL, count = outputs - first;
                if (count <= 0) continue;
                if (bias) out[i] += load(bias + first, count);
                store(y + (row + i / ABREAST) * outputs + first, out[i], count);
            }
        }
    }
}

// --- Unpacking ----------------------------------------------------------------------------------

// One row's 32 columns, whose lanes are pairs, times the scale.
inline void write_columns(float* to, i32x16 pairs, float scale) {
    typedef int16_t i16x16 __attribute__((vector_size(32)));
    const char* words = reinterpret_cast<const char*>(&pairs);
    for (int half = 0; half < 2; half++) {
        i32x16 wide = __builtin_convertvector(read<i16x16>(words + 32 * half), i32x16);
        store(to + half * LANES, __builtin_convertvector(wide, f32x16) * scale);
    }
}

inline void write_columns(bf16* to, i32x16 pairs, float scale) {
    f32x16 even = __builtin_convertvector((i32x16)((u32x16)pairs << 16) >> 16, f32x16) * scale;
    f32x16 odd = __builtin_convertvector(pairs >> 16, f32x16) * scale;
    u32x16 a = (u32x16)even, b = (u32x16)odd;
    a += 0x7fff + ((a >> 16) & 1);
    b += 0x7fff + ((b >> 16) & 1);
    write(to, (a >> 16) | (b & 0xffff0000));
}

// W [outputs, width] from its packed form.
template <int BITS, class T>
void unpack(const uint8_t* packed, const bf16* scales, T* weight, int64_t outputs, int64_t width,
            int64_t group, int threads) {
    int64_t panels = (outputs + PANEL - 1) / PANEL, groups = width / group;
#pragma omp parallel for schedule(static) num_threads(threads) if (panels * width > 2048)
    for (int64_t p = 0; p < panels; p++) {
        int64_t count = std::min(PANEL, outputs - p * PANEL);
        const uint8_t* from = packed + p * width * (PANEL * BITS / 8);
        for (int64_t i = 0; i < width; i += STRIP) {
            i32x16 pairs[16];
            for (int v = 0; v < 16 / PAIRS<BITS>; v++, from += 64)
                for (int j = 0; j < PAIRS<BITS>; j++)
                    pairs[v * PAIRS<BITS> + j] =
                        (i32x16)(pair_of_columns<BITS>(read<u16x32>(from), j) - (BITS == 4 ? 8 : 0));
            transpose(pairs);
            float scale[PANEL];
            write(scale, load(scales + (p * groups + i / group) * PANEL));
            for (int64_t r = 0; r < count; r++)
                write_columns(weight + (p * PANEL + r) * width + i, pairs[r], scale[r]);
        }
    }
}

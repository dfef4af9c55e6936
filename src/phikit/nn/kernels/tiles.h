// y = x W^T + b in bfloat16 by the processor's matrix unit (AMX), W as torch keeps it.
//
// The unit multiplies tiles of 16 rows of 64 bytes: a left one, 16 rows of 32 columns, by a right
// one, whose rows hold pairs of columns side by side. Rows of W are left operands as they lie, so
// that W is read once and at the speed of memory; x, the smaller matrix, is laid out anew. (torch
// lays out W, at every call.) A row's sums run in one order whatever the number of rows, so its
// result does not depend on its neighbours.

#pragma once

#include "simd.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && defined(PHIKIT_AVX512)
#define PHIKIT_AMX 1
#endif

#ifdef PHIKIT_AMX

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

constexpr int64_t SIDE = 16;           // rows of a tile
constexpr int64_t DEPTH = 32;          // columns that one product of tiles takes
constexpr int64_t BAND = 2 * SIDE;     // rows of W, or of x, that are taken together

// Whether the processor has the unit and the system lets this process use it.
inline bool tiles_ready() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// Eight full tiles, for as long as it lives; then what the thread had before.
class TileShapes {
    struct alignas(64) Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    Config before;

public:
    TileShapes() {
        _tile_storeconfig(&before);
        Config full = {1};
        std::fill(full.row_bytes, full.row_bytes + 8, 64);
        std::fill(full.rows, full.rows + 8, SIDE);
        asm volatile("" ::: "memory");  // gcc 12 takes the stores above for dead
        _tile_loadconfig(&full);
    }
    ~TileShapes() { _tile_loadconfig(&before); }
};

// Rows of x as right operands, [blocks of 16 rows][steps of 32 columns][16 pairs][16 rows].
inline void lay_out(const bf16* x, int64_t rows, int64_t width, i32x16* to, int threads) {
    int64_t steps = width / DEPTH, tiles = (rows + SIDE - 1) / SIDE * steps;
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t first = tile / steps * SIDE, column = tile % steps * DEPTH;
        i32x16* lanes = to + tile * SIDE;
        for (int64_t r = 0; r < SIDE; r++)
            lanes[r] = first + r < rows ? read<i32x16>(x + (first + r) * width + column) : i32x16{};
        transpose(lanes);
    }
}

// BAND rows of `weight` times BLOCKS * 16 rows of x; `sums` are tiles [BLOCKS][2][outputs][rows].
template <int BLOCKS>
void multiply_tiles(const bf16* weight, const bf16* next, const i32x16* x, int64_t width,
                    i32x16* sums) {
    int64_t steps = width / DEPTH, stride = width * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
        const bf16* at = weight + step * DEPTH;
        _tile_loadd(4, at, stride);
        _tile_loadd(5, at + SIDE * width, stride);
        _tile_loadd(6, x + step * SIDE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (BLOCKS == 2) {
            _tile_loadd(7, x + (steps + step) * SIDE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (next)
            for (int64_t r = 0; r < BAND; r++) __builtin_prefetch(next + (step * BAND + r) * DEPTH);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SIDE, 64);
    if (BLOCKS == 2) {
        _tile_stored(2, sums + 2 * SIDE, 64);
        _tile_stored(3, sums + 3 * SIDE, 64);
    }
}

// One tile of sums into `count` columns of y's rows.
inline void write_tile(i32x16* sums, const bf16* bias, bf16* y, int64_t rows, int64_t count,
                       int64_t outputs) {
    transpose(sums);
    for (int64_t r = 0; r < rows; r++) {
        f32x16 found = (f32x16)sums[r];
        if (bias) found += load(bias, count);
        store(y + r * outputs, found, count);
    }
}

// `width` is a multiple of DEPTH.
inline void tile_linear(const bf16* x, const bf16* weight, const bf16* bias, bf16* y, int64_t rows,
                        int64_t width, int64_t outputs, int threads) {
    static thread_local std::vector<i32x16> kept;
    int64_t steps = width / DEPTH, blocks = (rows + SIDE - 1) / SIDE;
    kept.resize(blocks * steps * SIDE);
    i32x16* right = kept.data();  // by its address, the other threads see this one
    lay_out(x, rows, width, right, threads);
    int64_t bands = (outputs + BAND - 1) / BAND;
#pragma omp parallel num_threads(threads)
    {
        TileShapes shapes;
        std::vector<bf16> padded;
#pragma omp for schedule(static)
        for (int64_t band = 0; band < bands; band++) {
            int64_t first = band * BAND;
            const bf16 *from = weight + first * width, *next = from + BAND * width;
            if (first + BAND > outputs) {
                padded.assign(BAND * width, bf16{});
                std::copy(from, weight + outputs * width, padded.begin());
                from = padded.data();
            }
            for (int64_t block = 0; block < blocks; block += 2) {
                const i32x16* operand = right + block * steps * SIDE;
                i32x16 sums[4 * SIDE];
                bool is_pair = block + 1 < blocks;
                auto multiply = is_pair ? multiply_tiles<2> : multiply_tiles<1>;
                multiply(from, block == 0 ? next : nullptr, operand, width, sums);
                for (int64_t tile = 0; tile < (is_pair ? 4 : 2); tile++) {
                    int64_t row = (block + tile / 2) * SIDE, output = first + tile % 2 * SIDE;
                    int64_t count = std::min(SIDE, outputs - output);
                    if (count > 0)
                        write_tile(sums + tile * SIDE, bias ? bias + output : nullptr,
                                   y + row * outputs + output, std::min(SIDE, rows - row), count,
                                   outputs);
                }
            }
        }
    }
}

#else

inline bool tiles_ready() { return false; }
inline void tile_linear(const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t, int) {}

#endif

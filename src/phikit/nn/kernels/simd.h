// Sixteen lanes at a time, in the vector extensions that gcc and clang share.
//
// A 64-byte vector is one register with AVX-512 and several elsewhere; the code is the same. Only
// where an instruction has no spelling in C++ (VNNI, bfloat16) is there an intrinsic, and a plain
// version beside it; -DPHIKIT_PORTABLE leaves the plain versions alone.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(PHIKIT_PORTABLE)
#include <immintrin.h>
#define PHIKIT_AVX512 1
#if defined(__AVX512VNNI__)
#define PHIKIT_VNNI 1
#endif
#if defined(__AVX512BF16__)
#define PHIKIT_BF16 1
#endif
#endif

constexpr int64_t LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

struct bf16 {
    uint16_t bits;
};

// What `Vector` is at any address, whatever was stored there.
template <class Vector> struct Anywhere {
    typedef Vector type __attribute__((aligned(1), may_alias));
};

template <class Vector> inline Vector read(const void* from) {
    return *static_cast<const typename Anywhere<Vector>::type*>(from);
}

// The same of a long run of memory that is read once: asks for what comes AHEAD bytes later. One
// row times packed weights takes a fifth to a third less time than when the processor is left to it.
constexpr int64_t AHEAD = 4096;

template <class Vector> inline Vector read_ahead(const void* from) {
    __builtin_prefetch(static_cast<const char*>(from) + AHEAD);
    return read<Vector>(from);
}

template <class Vector> inline void write(void* to, Vector value) {
    *static_cast<typename Anywhere<Vector>::type*>(to) = value;
}

// --- Sixteen numbers of memory as floats, and back ----------------------------------------------

inline f32x16 load(const float* from) { return read<f32x16>(from); }

inline f32x16 load(const bf16* from) {
    return (f32x16)(__builtin_convertvector(read<u16x16>(from), u32x16) << 16);
}

inline f32x16 load(const int8_t* from) {
    return __builtin_convertvector(__builtin_convertvector(read<i8x16>(from), i32x16), f32x16);
}

// The first `count` lanes, zeros in the rest.
template <class T> inline f32x16 load(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

inline void store(float* to, f32x16 value) { write(to, value); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline void store(bf16* to, f32x16 value) {
#ifdef PHIKIT_BF16
    write(to, (u16x16)_mm512_cvtneps_pbh((__m512)value));
#else
    u32x16 bits = (u32x16)value;
    u32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
    rounded = value == value ? rounded : bits | 0x400000;
    write(to, __builtin_convertvector(rounded >> 16, u16x16));
#endif
}

template <class T> inline void store(T* to, f32x16 value, int64_t count) {
    if (count >= LANES) return store(to, value);
    T padded[LANES];
    store(padded, value);
    std::memcpy(to, padded, count * sizeof(T));
}

// --- Arithmetic ---------------------------------------------------------------------------------

inline f32x16 spread(float value) { return value - f32x16{}; }

inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

inline f32x16 magnitude(f32x16 value) { return (f32x16)((u32x16)value & 0x7fffffff); }

inline float sum(f32x16 value) {
#ifdef PHIKIT_AVX512
    return _mm512_reduce_add_ps((__m512)value);
#else
    float lanes[LANES];
    write(lanes, value);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

inline float largest(f32x16 value) {
#ifdef PHIKIT_AVX512
    return _mm512_reduce_max_ps((__m512)value);
#else
    float found = value[0];
    for (int i = 1; i < LANES; i++) found = value[i] > found ? value[i] : found;
    return found;
#endif
}

// Adding 1.5 * 2^23 leaves the integer nearest to |value| < 2^22, ties to even, in the low bits.
constexpr float ROUNDER = 12582912.0f;

inline i32x16 nearest(f32x16 value) {
    return (i32x16)(value + ROUNDER) - (i32x16)spread(ROUNDER);
}

// e^x to 2 units in the last place; 0 below -87.3, infinity above 88.3; NaN stays NaN.
// 2^n * e^r with n the nearest integer to x / ln 2, whose ln 2 is subtracted in two parts, and
// the Taylor polynomial of e^r for |r| <= ln 2 / 2.
inline f32x16 exp(f32x16 x) {
    f32x16 shifted = x * 1.44269504f + ROUNDER;
    f32x16 n = shifted - ROUNDER;
    f32x16 r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    f32x16 p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    i32x16 power = ((i32x16)shifted - (i32x16)spread(ROUNDER) + 127) << 23;
    f32x16 found = x > 88.3f ? spread(INFINITY) : p * (f32x16)power;
    return x < -87.3f ? f32x16{} : found;
}

// --- Lanes of several vectors --------------------------------------------------------------------

#ifdef __clang__
#define PHIKIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PHIKIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i32x16{__VA_ARGS__})
#endif

// Transposes 16 x 16 lanes: interleaving vector i with i + 8 rotates the 8 bits of an element's
// address (vector, lane) by one, so four rounds exchange vector and lane.
inline void transpose(i32x16* lanes) {
    for (int round = 0; round < 4; round++) {
        i32x16 mixed[16];
        for (int i = 0; i < 8; i++) {
            i32x16 a = lanes[i], b = lanes[i + 8];
            mixed[2 * i] = PHIKIT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            mixed[2 * i + 1] =
                PHIKIT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < 16; i++) lanes[i] = mixed[i];
    }
}

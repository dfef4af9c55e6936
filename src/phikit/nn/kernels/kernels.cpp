// The functions that phikit.nn.kernels calls, with a C interface: addresses, sizes, dtype codes.
// Shapes are checked in Python; nothing here allocates results.

#include <type_traits>
#include <utility>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "packed.h"
#include "tiles.h"

namespace {

enum Code { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

template <class T> struct Type {
    typedef T type;
};

// Calls `run` with the type of `code` that models compute in.
template <class Run> void with_type(int code, Run run) {
    if (code == FLOAT32) run(Type<float>{});
    if (code == BFLOAT16) run(Type<bf16>{});
}

// The same for the types of a cache: that of the model, or int8.
template <class T, class Run> void with_cache_type(int code, Run run) {
    if (code == INT8)
        run(Type<int8_t>{});
    else
        run(Type<T>{});
}

template <class T> T* of(void* address) { return static_cast<T*>(address); }
template <class T> const T* of(const void* address) { return static_cast<const T*>(address); }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void phikit_rms_norm(int code, const void* x, const void* weight, void* out, int64_t rows,
                     int64_t width, float eps, int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        rms_norm(of<T>(x), of<T>(weight), of<T>(out), rows, width, eps, threads);
    });
}

void phikit_split_rotate(int code, const void* x, void* q, void* k, void* v, int64_t tokens,
                         int64_t heads, int64_t kv_heads, int64_t width, const void* cos,
                         const void* sin, int64_t angles, int64_t half, int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        split_rotate(of<T>(x), of<T>(q), of<T>(k), of<T>(v), tokens, heads, kv_heads, width,
                     of<T>(cos), of<T>(sin), angles, half, threads);
    });
}

void phikit_add(int code, const void* a, const void* b, void* out, int64_t count, int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        add(of<T>(a), of<T>(b), of<T>(out), count, threads);
    });
}

void phikit_gated_silu(int code, const void* gate_up, void* out, int64_t rows, int64_t width,
                       int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        gated_silu(of<T>(gate_up), of<T>(out), rows, width, threads);
    });
}

void phikit_linear(int code, const void* x, const void* weight, const void* bias, void* y,
                   int64_t rows, int64_t width, int64_t outputs, int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        linear(of<T>(x), of<T>(weight), of<T>(bias), of<T>(y), rows, width, outputs, threads);
    });
}

// Whether phikit_tile_linear works here; the first call asks the system for leave.
int phikit_tiles_ready() { return tiles_ready(); }

// In bfloat16 alone.
void phikit_tile_linear(const void* x, const void* weight, const void* bias, void* y, int64_t rows,
                        int64_t width, int64_t outputs, int threads) {
    tile_linear(of<bf16>(x), of<bf16>(weight), of<bf16>(bias), of<bf16>(y), rows, width, outputs,
                threads);
}

void phikit_packed_linear(int code, int bits, const void* x, const void* packed,
                          const void* scales, const void* bias, void* y, int64_t rows,
                          int64_t width, int64_t outputs, int64_t group, int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        auto run = bits == 4 ? packed_linear<4, T> : packed_linear<8, T>;
        run(of<T>(x), of<uint8_t>(packed), of<bf16>(scales), of<T>(bias), of<T>(y), rows, width,
            outputs, group, threads);
    });
}

void phikit_unpack(int code, int bits, const void* packed, const void* scales, void* weight,
                   int64_t outputs, int64_t width, int64_t group, int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        auto run = bits == 4 ? unpack<4, T> : unpack<8, T>;
        run(of<uint8_t>(packed), of<bf16>(scales), of<T>(weight), outputs, width, group, threads);
    });
}

void phikit_store(int code, int cache_code, const void* k, const void* v, void* keys,
                  void* values, float* key_scales, float* value_scales, int64_t block_tokens,
                  int64_t kv_heads, int64_t width, const int64_t* slots, int64_t tokens,
                  int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        with_cache_type<T>(cache_code, [&](auto cache_type) {
            typedef typename decltype(cache_type)::type C;
            Cache<C> cache{of<C>(keys), of<C>(values), key_scales, value_scales,
                           block_tokens, kv_heads, width};
            store_tokens(of<T>(k), of<T>(v), cache, slots, tokens, threads);
        });
    });
}

void phikit_paged_attention(int code, int cache_code, const void* q, void* keys, void* values,
                            float* key_scales, float* value_scales, int64_t block_tokens,
                            int64_t kv_heads, int64_t width, const int32_t* tables,
                            const int32_t* rows, const int32_t* lengths, void* out, int64_t tokens,
                            int64_t heads, int64_t blocks, int64_t window, int threads) {
    with_type(code, [&](auto type) {
        typedef typename decltype(type)::type T;
        Queries<T> in{of<T>(q), of<T>(out), tables, rows, lengths, tokens, heads, blocks, window};
        with_cache_type<T>(cache_code, [&](auto cache_type) {
            typedef typename decltype(cache_type)::type C;
            Cache<C> cache{of<C>(keys), of<C>(values), key_scales, value_scales,
                           block_tokens, kv_heads, width};
            paged_attention(in, cache, threads);
        });
    });
}

}

namespace {

// An argument as it was written down: an address, a size, or the bits of a double.
template <class A> A argument(int64_t word) {
    if constexpr (std::is_pointer_v<A>) return reinterpret_cast<A>(word);
    if constexpr (std::is_floating_point_v<A>) return A(read<double>(&word));
    if constexpr (std::is_integral_v<A>) return A(word);
}

constexpr int64_t ARGUMENTS = 19;  // the most that a function takes

template <class... A, size_t... I>
void call(void (*function)(A...), const int64_t* words, std::index_sequence<I...>) {
    static_assert(sizeof...(A) <= ARGUMENTS);
    function(argument<A>(words[I])...);
}

template <class... A> void call(void (*function)(A...), const int64_t* words) {
    call(function, words, std::index_sequence_for<A...>{});
}

template <auto FUNCTION> void called(const int64_t* words) { call(FUNCTION, words); }

// In the order of _SIGNATURES in Python.
constexpr void (*FUNCTIONS[])(const int64_t*) = {
    called<phikit_rms_norm>, called<phikit_split_rotate>,  called<phikit_add>,
    called<phikit_gated_silu>, called<phikit_linear>,      called<phikit_tile_linear>,
    called<phikit_packed_linear>, called<phikit_unpack>, called<phikit_store>,
    called<phikit_paged_attention>,
};

}  // namespace

extern "C" {

// Calls as they were written down: the function's place in FUNCTIONS, then its arguments.
void phikit_replay(const int64_t* calls, int64_t count) {
    for (; count > 0; count--, calls += 1 + ARGUMENTS) FUNCTIONS[calls[0]](calls + 1);
}
}
#pragma GCC visibility pop

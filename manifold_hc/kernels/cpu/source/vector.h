// Vectors of float, streams in float or bfloat16, loops over channels: shared by every operator.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4;
constexpr int REGISTERS = 32;
#else
constexpr int LANES = 4;
constexpr int REGISTERS = 16;
#endif

// True if one instruction multiplies two pairs of bfloat16 in every lane.
#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_PAIRS = true;
#else
constexpr bool MULTIPLIES_PAIRS = false;
#endif

constexpr int MAX_STREAMS = 16;

#define INLINE inline __attribute__((always_inline))
// For long functions with several callers that run rarely: compiled once.
#define NOINLINE __attribute__((noinline))

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float AnyVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t AnyWords __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t AnyHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

// Memory whose vectors lie in one cache line each: a vector across two lines is loaded twice.
constexpr std::align_val_t LINE{64};
template <class T>
struct Lines {
    using value_type = T;
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), LINE); }
    void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
    bool operator==(const Lines&) const { return true; }
    bool operator!=(const Lines&) const { return false; }
};
template <class T>
using Room = std::vector<T, Lines<T>>;

// All lanes of a vector, or the first `count` of them at a row's end.
struct Whole {};
struct Part {
    int count;
};

// Subtracting a zero changes nothing and costs nothing; adding one turns -0 into 0.
INLINE Vec broadcast(float value) { return value - Vec{}; }
INLINE Words broadcast(uint32_t value) { return Words{} + value; }

INLINE Vec load(const float* p, Whole) { return *(const AnyVec*)p; }
INLINE void store(float* p, Vec v, Whole) { *(AnyVec*)p = v; }

INLINE Words widened(Halves halves) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)halves);  // GCC does it in five instructions
#else
    return __builtin_convertvector(halves, Words);
#endif
}

// To bfloat16, to nearest, ties to even; a NaN stays one. The processor's own instruction flushes
// subnormal numbers to 0.
INLINE Halves rounded(Vec v) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const Words bits = (Words)v;
    const Words nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(v == v ? nearest : Words{} + 0x7fc0u, Halves);
#endif
}

INLINE Vec of_bfloat16(Halves halves) { return (Vec)(widened(halves) << 16); }

INLINE Vec load(const bfloat16* p, Whole) { return of_bfloat16(*(const AnyHalves*)p); }
INLINE void store(bfloat16* p, Vec v, Whole) { *(AnyHalves*)p = rounded(v); }

// The value after a store to memory of this type.
INLINE Vec held(const float*, Vec v) { return v; }
INLINE Vec held(const bfloat16*, Vec v) { return of_bfloat16(rounded(v)); }

INLINE Words load(const uint32_t* p, Whole) { return *(const AnyWords*)p; }
INLINE void store(uint32_t* p, Words v) { *(AnyWords*)p = v; }

// Two bfloat16 in every lane, as they lie in memory.
INLINE Words load_pairs(const bfloat16* p, Whole) { return *(const AnyWords*)p; }
INLINE Words load_pairs(const bfloat16* p, Part part) {
    bfloat16 row[2 * LANES] = {};
    std::memcpy(row, p, part.count * sizeof(bfloat16));
    return load_pairs(row, Whole{});
}

// The same vector, in a register: GCC would load it again for every product, and products wait for
// loads.
template <class V>
INLINE V in_register(V v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
}

// Prefetches an address that is read soon: the rows of a token's streams are too short, and too
// many at a time, for the processor's own prefetcher.
INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

template <class T>
INLINE Vec load(const T* p, Part part) {
    T row[LANES] = {};
    std::memcpy(row, p, part.count * sizeof(T));
    return load(row, Whole{});
}

template <class T>
INLINE void store(T* p, Vec v, Part part) {
    T row[LANES];
    store(row, v, Whole{});
    std::memcpy(p, row, part.count * sizeof(T));
}

// body(c, width) for every STEP of the channels [from, to); STEP is a vector by default.
template <int STEP = LANES, class Body>
INLINE void for_channels(int64_t from, int64_t to, Body body) {
    int64_t c = from;
    for (; c + STEP <= to; c += STEP) body(c, Whole{});
    if (c < to) body(c, Part{(int)(to - c)});
}

INLINE Vec add_products(Vec sum, Vec a, Vec b) { return sum + a * b; }

// Both products of every lane's pairs; they are exact.
INLINE Vec add_products(Vec sum, Words a, Words b) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Vec)(a << 16) * (Vec)(b << 16);
    return sum + (Vec)(a & 0xffff0000u) * (Vec)(b & 0xffff0000u);
#endif
}

// Operands of inner products of rows of these types: pairs if all are bfloat16.
template <class... T>
struct Factors {
    static constexpr bool PAIRS = (std::is_same_v<T, bfloat16> && ...);
    static constexpr int STEP = PAIRS ? 2 * LANES : LANES;
    template <class X, class Width>
    INLINE static auto load(const X* p, Width width) {
        if constexpr (PAIRS)
            return load_pairs(p, width);
        else
            return ::load(p, width);
    }
};

INLINE float sum(Vec v) {
    float total = 0;
    for (int half = LANES / 2; half >= 4; half /= 2)
        for (int lane = 0; lane < half; lane++) v[lane] += v[lane + half];
    for (int lane = 0; lane < 4; lane++) total += v[lane];
    return total;
}

INLINE Vec larger(Vec a, Vec b) { return a < b ? b : a; }
INLINE Vec smaller(Vec a, Vec b) { return b < a ? b : a; }

// e^x to two ulp, flushed to 0 below the normal numbers; NaN in, NaN out.
INLINE Vec exponential(Vec x) {
    const Vec lowest = broadcast(-87.3f), highest = broadcast(88.0f);
    Vec bounded = x < lowest ? lowest : x;
    bounded = bounded > highest ? highest : bounded;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Vec shifted = bounded * 1.44269504f + magic;
    Vec k = shifted - magic;
    Vec r = bounded - k * 0.693359375f + k * 2.12194440e-4f;
    Vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints exponent = ((Ints)shifted - (Ints)broadcast(magic) + 127) << 23;
    Vec result = p * (Vec)exponent;
    return x < lowest ? Vec{} : result;
}

INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// Calls body with n as a constant for the usual numbers, so that loops over streams unroll there.
template <class Body>
inline void with_streams(int n, Body body) {
    switch (n) {
        case 2: return body(std::integral_constant<int, 2>{});
        case 4: return body(std::integral_constant<int, 4>{});
        case 8: return body(std::integral_constant<int, 8>{});
        default: return body(n);
    }
}

// A number of streams as `with_streams` passes it.
template <class N>
INLINE N number(int n) {
    if constexpr (std::is_same_v<N, int>)
        return n;
    else
        return N{};
}

// Calls body with a null pointer of the streams' type.
template <class Body>
inline void with_dtype(int is_bfloat16, Body body) {
    if (is_bfloat16)
        body((bfloat16*)nullptr);
    else
        body((float*)nullptr);
}

// Calls body with null pointers of the streams' type and of the branch's.
template <class Body>
inline void with_dtypes(int is_bfloat16, int y_is_bfloat16, Body body) {
    with_dtype(is_bfloat16, [&](auto* x) {
        with_dtype(y_is_bfloat16, [&](auto* y) { body(x, y); });
    });
}

// Size of arrays over streams: the constant itself, or MAX_STREAMS for a run-time n.
template <class Number>
constexpr int limit = MAX_STREAMS;
template <int value>
constexpr int limit<std::integral_constant<int, value>> = value;

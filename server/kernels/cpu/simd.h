// Sixteen floats at a time, whatever the processor has: kernels are written once over F16 and Mask.
//
// The variant is decided by the compiler flags of a build (see build.py): AVX2 with FMA, AVX-512, AVX-512 with
// bfloat16 products, or those with AMX tiles.
#pragma once
#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace boomerang {

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}

// The line of p will be written: had alone and early, it does not hold up the store. A hint that older processors ignore.
#ifdef __aarch64__
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }
#else
inline void prefetch_to_write(const void* p) { asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p))); }
#endif
// To the second-level cache; or past it, where it is read once and soon.
inline __attribute__((always_inline)) void prefetch_second(const void* p) { __builtin_prefetch(p, 0, 2); }
inline __attribute__((always_inline)) void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }

}  // namespace boomerang

#ifdef __aarch64__
#include "simd_neon.h"
#elif defined(__AVX512F__)
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace boomerang {

// e^x: 2^round(x log2 e) times a polynomial on the rest (coefficients of Cephes' expf); relative error about 1e-7.
inline F16 exp16(F16 x) {
    x = max16(min16(x, set16(88.0f)), set16(-87.0f));
    F16 n = round16(x * set16(1.44269504088896341f));
    F16 r = fma16(n, set16(-0.693359375f), x);
    r = fma16(n, set16(2.12194440e-4f), r);
    F16 p = set16(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma16(p, r, set16(c));
    p = fma16(p * r, r, r + set16(1.0f));
    return scale_by_power16(p, n);
}

// 2^t by a minimax polynomial: on [0, 1), good for results that are rounded to bfloat16 (`fast`, relative error 8e-5), or
// on [-1/2, 1/2], with 1e-7 beside the rounding of t itself.
template <bool fast>
inline F16 power_of_two16(F16 t) {
    if (fast) {
        const F16 r = fraction16(t);
        F16 p = fma16(r, set16(0.07802452f), set16(0.22606716f));
        p = fma16(p, r, set16(0.69583351f));
        p = fma16(p, r, set16(0.99992521f));
        return scale_by_floor16(p, t);
    }
    const F16 n = round16(t), r = t - n;
    F16 p = fma16(r, set16(0.00132764725f), set16(0.00967554096f));
    for (float c : {0.0555071309f, 0.240221202f, 0.693146944f, 1.0f}) p = fma16(p, r, set16(c));
    return scale_by_power16(p, n);
}
constexpr float kLog2E = 1.44269504088896341f;

enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2 };

// `fast`: the result is going to be rounded to bfloat16.
template <bool fast>
inline F16 activate16(F16 x, int kind) {
    if (kind != GELU) {
        // GELU_TANH: 0.5 x (1 + tanh(u)) = x sigmoid(2u).
        const F16 u = kind == SILU ? x : fma16(x * x * x, set16(0.044715f), x) * set16(2.0f * 0.7978845608028654f);
        // Bounded, so that the power is finite and x / it does not become 0 / infinity.
        const F16 below = set16(1.0f) + power_of_two16<fast>(min16(u * set16(-kLog2E), set16(126.0f)));
        return fast ? x * reciprocal16(below) : x / below;
    }
    alignas(64) float v[16];
    store16(v, x);
    for (float& y : v) y = 0.5f * y * (1.0f + std::erf(y * 0.70710678118654752f));
    return load16(v);
}

}  // namespace boomerang

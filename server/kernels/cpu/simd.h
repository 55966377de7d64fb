// Sixteen floats at a time, whatever the processor has: kernels are written once over F16 and Mask.
//
// The variant is decided by the compiler flags of a build (see build.py): AVX2 with FMA, AVX-512, AVX-512 with
// bfloat16 products, or those with AMX tiles.
#pragma once
#include <immintrin.h>

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

}  // namespace boomerang

#ifdef __AVX512F__
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

enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2 };

inline F16 activate16(F16 x, int kind) {
    const F16 one = set16(1.0f);
    if (kind == SILU) return x / (exp16(zero16() - x) + one);
    if (kind == GELU_TANH) {  // 0.5 x (1 + tanh(u)) = x sigmoid(2u)
        F16 u = fma16(x * x * x, set16(0.044715f), x);
        return x / (exp16(u * set16(-2.0f * 0.7978845608028654f)) + one);
    }
    alignas(64) float v[16];
    store16(v, x);
    for (float& y : v) y = 0.5f * y * (1.0f + std::erf(y * 0.70710678118654752f));
    return load16(v);
}

}  // namespace boomerang

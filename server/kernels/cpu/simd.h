// Vector helpers. One weight type W per build of a kernel: float, or bfloat16 with AVX512-BF16 dot products.
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

inline __mmask16 tail16(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }

// 16 values of W as float.
inline __m512 load16(const float* p, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load16(const bf16* p, __mmask16 mask = 0xffff) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
inline void store16(float* p, __m512 x, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(p, mask, x); }
inline void store16(bf16* p, __m512 x, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// One step of a dot product: `Dot<W>::width` values of both operands into 16 partial sums.
template <class W>
struct Dot;
template <>
struct Dot<float> {
    static constexpr int width = 16;
    using Vec = __m512;
    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static Vec load_tail(const float* p, int n) { return _mm512_maskz_loadu_ps(tail16(n), p); }
    static __m512 fma(__m512 acc, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, acc); }
};
template <>
struct Dot<bf16> {
    static constexpr int width = 32;
    using Vec = __m512bh;
    static Vec load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec load_tail(const bf16* p, int n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffffu : (1u << n) - 1, p);
    }
    static __m512 fma(__m512 acc, Vec a, Vec b) { return _mm512_dpbf16_ps(acc, a, b); }
};

// Lane i of the result is the sum of all lanes of a[i].
inline __m512 reduce16(const __m512* a) {
    __m512 q[4];
    for (int i = 0; i < 4; i++) {
        const __m512* p = a + 4 * i;
        __m512 r01 = _mm512_add_ps(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1]));
        __m512 r23 = _mm512_add_ps(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3]));
        __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(r01), _mm512_castps_pd(r23));
        __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(r01), _mm512_castps_pd(r23));
        q[i] = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    }
    __m512 t0 = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
    __m512 t1 = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(t0, t1, 0x88), _mm512_shuffle_f32x4(t0, t1, 0xdd));
}

// e^x: 2^round(x log2 e) times a polynomial on the rest (coefficients of Cephes' expf); relative error about 1e-7.
inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

inline __m512 silu16(__m512 x) {
    __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2 };

inline __m512 activate16(__m512 x, int kind) {
    if (kind == SILU) return silu16(x);
    if (kind == GELU_TANH) {  // 0.5 x (1 + tanh(u)) = x sigmoid(2u)
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        __m512 e = exp16(_mm512_mul_ps(u, _mm512_set1_ps(-2.0f * 0.7978845608028654f)));
        return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
    }
    alignas(64) float v[16];
    _mm512_store_ps(v, x);
    for (float& y : v) y = 0.5f * y * (1.0f + std::erf(y * 0.70710678118654752f));
    return _mm512_load_ps(v);
}

}  // namespace boomerang

// F16 on AVX-512: one register.
#pragma once

namespace boomerang {

using F16 = __m512;  // the compiler's vector type: + - * / work on it
using Mask = __mmask16;

inline Mask tail16(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : Mask((1u << n) - 1); }
inline F16 zero16() { return _mm512_setzero_ps(); }
inline F16 set16(float x) { return _mm512_set1_ps(x); }
inline F16 fma16(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 max16(F16 a, F16 b) { return _mm512_max_ps(a, b); }
inline F16 min16(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 round16(F16 x) { return _mm512_roundscale_ps(x, 8); }
inline F16 scale_by_power16(F16 x, F16 n) { return _mm512_scalef_ps(x, n); }
inline F16 fraction16(F16 x) { return _mm512_reduce_ps(x, 9); }                         // x - floor(x)
inline F16 scale_by_floor16(F16 x, F16 t) { return _mm512_scalef_ps(x, t); }            // x 2^floor(t)
inline F16 reciprocal16(F16 x) { return _mm512_rcp14_ps(x); }  // relative error 2^-14
inline float sum16(F16 x) { return _mm512_reduce_add_ps(x); }
inline float top16(F16 x) { return _mm512_reduce_max_ps(x); }
inline F16 keep16(Mask mask, F16 x) { return _mm512_maskz_mov_ps(mask, x); }
inline F16 choose16(Mask mask, F16 x, F16 otherwise) { return _mm512_mask_mov_ps(otherwise, mask, x); }
inline Mask greater16(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask equal16(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask and16(Mask a, Mask b) { return a & b; }
inline int first16(Mask mask) { return mask ? __builtin_ctz(mask) : -1; }

// Whole vectors apart: the compiler does not see that a mask of ones is none.
inline F16 load16(const float* p) { return _mm512_loadu_ps(p); }
inline F16 load16(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline F16 load16(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline F16 load16(const bf16* p, Mask mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
inline void store16(float* p, F16 x) { _mm512_storeu_ps(p, x); }
inline void store16(float* p, F16 x, Mask mask) { _mm512_mask_storeu_ps(p, mask, x); }

// Every second of 32 bfloat16 values, and of those from p on.
inline F16 even_of(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline F16 odd_of(__m512i words) { return _mm512_castsi512_ps(_mm512_and_epi32(words, _mm512_set1_epi32(int(0xffff0000)))); }
inline F16 even_bf16(const char* p) { return even_of(_mm512_loadu_si512(p)); }
inline F16 odd_bf16(const char* p) { return odd_of(_mm512_loadu_si512(p)); }
// The words of a line of 32 channels, two inputs each, by halves.
struct WideLine {
    __m512i half[2];
};
inline F16 even_words(const WideLine& wide, int half) { return even_of(wide.half[half]); }
inline F16 odd_words(const WideLine& wide, int half) { return odd_of(wide.half[half]); }

// The 16 values as bfloat16, rounded to nearest even.
inline __m256i narrow16(F16 x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), one);
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline void store16(bf16* p, F16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(x)); }
inline void store16(bf16* p, F16 x, Mask mask) { _mm256_mask_storeu_epi16(p, mask, narrow16(x)); }

#ifdef __AVX512BF16__
inline void store32(bf16* p, F16 low, F16 high) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }
#endif

// Every second bfloat16 from p on: 16 values into the even (first = 0) or odd (first = 1) places of 32.
inline void store_every_second16(bf16* p, int first, F16 x) {
    const __m512i wide = _mm512_cvtepu16_epi32(narrow16(x));
    if (first == 0)
        _mm512_mask_storeu_epi16(p, 0x55555555, wide);
    else
        _mm512_mask_storeu_epi16(p, 0xaaaaaaaa, _mm512_slli_epi32(wide, 16));
}

// The same for both: 16 values into the even places and 16 into the odd ones.
inline void store_pairs16(bf16* p, F16 even, F16 odd) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow16(even)), high = _mm512_cvtepu16_epi32(narrow16(odd));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// 16 x 16 four-byte values, rows to columns.
inline void transpose16(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace boomerang

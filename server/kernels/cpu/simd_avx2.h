// F16 on AVX2 with FMA: two registers of eight.
#pragma once
#include <algorithm>

namespace boomerang {

struct F16 {
    __m256 low, high;
};
using Mask = F16;  // all bits of a lane set or clear

inline F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

inline F16 zero16() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 set16(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 fma16(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline F16 max16(F16 a, F16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F16 min16(F16 a, F16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F16 round16(F16 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
}
inline F16 reciprocal16(F16 x) { return set16(1.0f) / x; }

// x 2^n for whole n, by the exponent's bits; 0 where the result would not be a normal number.
inline __m256 scale_by_power8(__m256 x, __m256 n) {
    const __m256 alive = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_GE_OQ);
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(alive, _mm256_mul_ps(x, _mm256_castsi256_ps(bits)));
}
inline F16 scale_by_power16(F16 x, F16 n) { return {scale_by_power8(x.low, n.low), scale_by_power8(x.high, n.high)}; }

inline F16 floor16(F16 x) { return {_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}; }
inline F16 fraction16(F16 x) { return x - floor16(x); }
inline F16 scale_by_floor16(F16 x, F16 t) { return scale_by_power16(x, floor16(t)); }  // x 2^floor(t)

inline float sum16(F16 x) {
    const __m256 s = _mm256_add_ps(x.low, x.high);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float top16(F16 x) {
    const __m256 s = _mm256_max_ps(x.low, x.high);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

inline __m256 lanes_below8(int n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
}
inline Mask tail16(int n) { return {lanes_below8(n), lanes_below8(n - 8)}; }
inline F16 keep16(Mask mask, F16 x) { return {_mm256_and_ps(mask.low, x.low), _mm256_and_ps(mask.high, x.high)}; }
inline F16 choose16(Mask mask, F16 x, F16 otherwise) {
    return {_mm256_blendv_ps(otherwise.low, x.low, mask.low), _mm256_blendv_ps(otherwise.high, x.high, mask.high)};
}
inline Mask greater16(F16 a, F16 b) { return {_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ)}; }
inline Mask equal16(F16 a, F16 b) { return {_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)}; }
inline Mask and16(Mask a, Mask b) { return keep16(a, b); }
inline int bits16(Mask m) { return _mm256_movemask_ps(m.low) | _mm256_movemask_ps(m.high) << 8; }
inline int first16(Mask mask) { return bits16(mask) ? __builtin_ctz(bits16(mask)) : -1; }

inline F16 load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load16(const float* p, Mask mask) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(mask.low)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(mask.high))};
}
inline void store16(float* p, F16 x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
inline void store16(float* p, F16 x, Mask mask) {
    _mm256_maskstore_ps(p, _mm256_castps_si256(mask.low), x.low);
    _mm256_maskstore_ps(p + 8, _mm256_castps_si256(mask.high), x.high);
}

inline __m256 widen8(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline F16 load16(const bf16* p) { return {widen8(p), widen8(p + 8)}; }
inline F16 load16(const bf16* p, Mask mask) {
    if (bits16(mask) == 0xffff) return load16(p);
    bf16 row[16] = {};  // what lies beyond the mask may not be readable
    for (int i = 0; i < 16; i++)
        if (bits16(mask) >> i & 1) row[i] = p[i];
    return load16(row);
}

// Rounded to nearest even, as 32-bit values.
inline __m256i narrow8(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
inline __m256i narrow16(F16 x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow8(x.low), narrow8(x.high)), 0xd8); }
inline void store16(bf16* p, F16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(x)); }
inline void store16(bf16* p, F16 x, Mask mask) {
    if (bits16(mask) == 0xffff) return store16(p, x);
    bf16 row[16];
    store16(row, x);
    for (int i = 0; i < 16; i++)
        if (bits16(mask) >> i & 1) p[i] = row[i];
}
inline void store_every_second16(bf16* p, int first, F16 x) {
    bf16 row[16];
    store16(row, x);
    for (int i = 0; i < 16; i++) p[2 * i + first] = row[i];
}

// Every second of 32 bfloat16 values, and of those from p on.
inline __m256i at8(const char* p, int eight) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + eight); }
inline F16 even_of(__m256i low, __m256i high) { return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))}; }
inline F16 odd_of(__m256i low, __m256i high) {
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
}
inline F16 even_bf16(const char* p) { return even_of(at8(p, 0), at8(p, 1)); }
inline F16 odd_bf16(const char* p) { return odd_of(at8(p, 0), at8(p, 1)); }
// The words of a line of 32 channels, two inputs each: [half][eight].
struct WideLine {
    __m256i words[2][2];
};
inline F16 even_words(const WideLine& wide, int half) { return even_of(wide.words[half][0], wide.words[half][1]); }
inline F16 odd_words(const WideLine& wide, int half) { return odd_of(wide.words[half][0], wide.words[half][1]); }

}  // namespace boomerang

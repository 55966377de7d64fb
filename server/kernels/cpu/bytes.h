// Vectors of bytes that are multiplied in fours: unsigned codes times signed activations, summed to 32 bits.
#pragma once
#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#ifdef __aarch64__
#include "bytes_neon.h"
#else

namespace boomerang {

#if defined(__AVX512F__)
using Bytes = __m512i;  // 16 channels by 4 inputs, or 16 sums
using Floats = __m512;
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes every_byte(int x) { return _mm512_set1_epi8(char(x)); }
inline Bytes every_four(int32_t x) { return _mm512_set1_epi32(x); }
template <int n>
inline Bytes shifted(Bytes x) {  // bits that cross bytes are the caller's to mask
    return n > 0 ? _mm512_slli_epi16(x, n > 0 ? n : 0) : n < 0 ? _mm512_srli_epi16(x, n < 0 ? -n : 0) : x;
}
template <int n>
inline Bytes times_power(Bytes x) { return _mm512_slli_epi32(x, n); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes with(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes flip(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
inline Bytes chosen(Bytes mask, Bytes a, Bytes b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }  // bits of a where the mask has them, else of b
inline Bytes minus32(Bytes a, Bytes b) { return _mm512_sub_epi32(a, b); }
inline Bytes plus32(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
inline Bytes plus8(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes plus16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline void in_this_order(Bytes& sum) { asm("" : "+v"(sum)); }
inline Bytes pair_products(Bytes w, Bytes x) { return _mm512_maddubs_epi16(w, x); }
inline Bytes sum_pairs(Bytes x) { return _mm512_madd_epi16(x, _mm512_set1_epi16(1)); }
inline Bytes magnitude(Bytes w) { return _mm512_abs_epi8(w); }
inline Bytes with_sign_of(Bytes x, Bytes w) { return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x); }
inline Floats to_floats(Bytes x) { return _mm512_cvtepi32_ps(x); }
inline Floats no_floats() { return _mm512_setzero_ps(); }
inline Floats every_float(float x) { return _mm512_set1_ps(x); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats load_halves(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline Floats load_u8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))); }
inline Floats load_i8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))); }
#else
using Bytes = __m256i;  // eight channels
using Floats = __m256;
inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, Bytes x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline Bytes zero_bytes() { return _mm256_setzero_si256(); }
inline Bytes every_byte(int x) { return _mm256_set1_epi8(char(x)); }
inline Bytes every_four(int32_t x) { return _mm256_set1_epi32(x); }
template <int n>
inline Bytes shifted(Bytes x) {
    return n > 0 ? _mm256_slli_epi16(x, n > 0 ? n : 0) : n < 0 ? _mm256_srli_epi16(x, n < 0 ? -n : 0) : x;
}
template <int n>
inline Bytes times_power(Bytes x) { return _mm256_slli_epi32(x, n); }
inline Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes with(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes flip(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
inline Bytes chosen(Bytes mask, Bytes a, Bytes b) { return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b)); }
inline Bytes minus32(Bytes a, Bytes b) { return _mm256_sub_epi32(a, b); }
inline Bytes plus32(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
inline Bytes plus8(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes plus16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline void in_this_order(Bytes& sum) { asm("" : "+x"(sum)); }
inline Bytes pair_products(Bytes w, Bytes x) { return _mm256_maddubs_epi16(w, x); }
inline Bytes sum_pairs(Bytes x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
inline Bytes magnitude(Bytes w) { return _mm256_abs_epi8(w); }
inline Bytes with_sign_of(Bytes x, Bytes w) { return _mm256_sign_epi8(x, w); }
inline Floats to_floats(Bytes x) { return _mm256_cvtepi32_ps(x); }
inline Floats no_floats() { return _mm256_setzero_ps(); }
inline Floats every_float(float x) { return _mm256_set1_ps(x); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats load_halves(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Floats load_u8(const void* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))); }
inline Floats load_i8(const void* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))); }
#endif

// Sums of four products at once, without overflow whatever the codes. Where there is no such instruction products are
// summed to 16 bits, which holds as many lines as the width of the codes allows, signed ones for codes of eight bits.
constexpr bool kSignedBytes = false;
#if defined(__AVX512VNNI__)
constexpr bool kFours = true;
inline Bytes add_fours(Bytes sum, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr bool kFours = true;
inline Bytes add_fours(Bytes sum, Bytes w, Bytes x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
constexpr bool kFours = false;
inline Bytes add_fours(Bytes sum, Bytes, Bytes) { return sum; }
#endif

constexpr int kLanes = sizeof(Bytes) / 4;  // channels of a vector

}  // namespace boomerang

#endif

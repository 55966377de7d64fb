// Vectors of bytes on NEON: four channels by four inputs. Codes of up to seven bits are taken as signed, those of eight bits
// without their centre (codes_block.h), since products here are of signed bytes.
#pragma once

namespace boomerang {

using Bytes = uint8x16_t;  // four channels, or four sums
using Floats = float32x4_t;
inline int32x4_t sums_of(Bytes x) { return vreinterpretq_s32_u8(x); }
inline int8x16_t signed_of(Bytes x) { return vreinterpretq_s8_u8(x); }
inline Bytes bytes_of(int32x4_t x) { return vreinterpretq_u8_s32(x); }
inline Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline void store_bytes(void* p, Bytes x) { vst1q_u8(static_cast<uint8_t*>(p), x); }
inline Bytes zero_bytes() { return vdupq_n_u8(0); }
inline Bytes every_byte(int x) { return vdupq_n_u8(uint8_t(x)); }
inline Bytes every_four(int32_t x) { return bytes_of(vdupq_n_s32(x)); }
template <int n>
inline Bytes shifted(Bytes x) {  // bits that cross bytes are the caller's to mask
    if constexpr (n > 0) return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(x), n));
    if constexpr (n < 0) return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(x), -n));
    return x;
}
template <int n>
inline Bytes times_power(Bytes x) { return bytes_of(vshlq_n_s32(sums_of(x), n)); }
inline Bytes both(Bytes a, Bytes b) { return vandq_u8(a, b); }
inline Bytes with(Bytes a, Bytes b) { return vorrq_u8(a, b); }
inline Bytes chosen(Bytes mask, Bytes a, Bytes b) { return vbslq_u8(mask, a, b); }  // bits of a where the mask is set
inline Bytes flip(Bytes a, Bytes b) { return veorq_u8(a, b); }
inline Bytes minus32(Bytes a, Bytes b) { return bytes_of(vsubq_s32(sums_of(a), sums_of(b))); }
inline Bytes plus32(Bytes a, Bytes b) { return bytes_of(vaddq_s32(sums_of(a), sums_of(b))); }
inline Bytes plus8(Bytes a, Bytes b) { return vaddq_u8(a, b); }
inline Bytes plus16(Bytes a, Bytes b) { return vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b))); }
inline void in_this_order(Bytes& sum) { asm("" : "+w"(sum)); }
inline Bytes pair_products(Bytes w, Bytes x) {
    const int16x8_t low = vmull_s8(vget_low_s8(signed_of(w)), vget_low_s8(signed_of(x))), high = vmull_high_s8(signed_of(w), signed_of(x));
    return vreinterpretq_u8_s16(vpaddq_s16(low, high));
}
inline Bytes sum_pairs(Bytes x) { return bytes_of(vpaddlq_s16(vreinterpretq_s16_u8(x))); }
inline Bytes magnitude(Bytes w) { return w; }  // the product is of signed bytes anyway
inline Bytes with_sign_of(Bytes x, Bytes) { return x; }
inline Floats to_floats(Bytes x) { return vcvtq_f32_s32(sums_of(x)); }
inline Floats no_floats() { return vdupq_n_f32(0.0f); }
inline Floats every_float(float x) { return vdupq_n_f32(x); }
inline Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats load_floats(const float* p) { return vld1q_f32(p); }
inline void store_floats(float* p, Floats x) { vst1q_f32(p, x); }
inline Floats load_halves(const void* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(p)))); }
inline uint8x8_t load_four(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpret_u8_u32(vdup_n_u32(four));
}
inline Floats load_u8(const void* p) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_four(p))))); }
inline Floats load_i8(const void* p) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four(p)))))); }

constexpr bool kSignedBytes = true;
#ifdef __ARM_FEATURE_DOTPROD
constexpr bool kFours = true;
inline Bytes add_fours(Bytes sum, Bytes w, Bytes x) { return bytes_of(vdotq_s32(sums_of(sum), signed_of(w), signed_of(x))); }
#else
constexpr bool kFours = false;
inline Bytes add_fours(Bytes sum, Bytes, Bytes) { return sum; }
#endif

constexpr int kLanes = 4;  // channels of a vector

}  // namespace boomerang

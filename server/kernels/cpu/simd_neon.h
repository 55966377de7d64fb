// F16 on NEON (aarch64): four registers of four.
#pragma once
#include <algorithm>

namespace boomerang {

struct F16 {
    float32x4_t v[4];
};
struct Mask {
    uint32x4_t v[4];  // all bits of a lane set or clear
};

template <class Each>
inline F16 fours(Each&& each) { return {each(0), each(1), each(2), each(3)}; }
template <class Each>
inline Mask masks(Each&& each) { return {each(0), each(1), each(2), each(3)}; }

inline F16 operator+(F16 a, F16 b) { return fours([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
inline F16 operator-(F16 a, F16 b) { return fours([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
inline F16 operator*(F16 a, F16 b) { return fours([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
inline F16 operator/(F16 a, F16 b) { return fours([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }

inline F16 set16(float x) { return fours([&](int) { return vdupq_n_f32(x); }); }
inline F16 zero16() { return set16(0.0f); }
inline F16 fma16(F16 a, F16 b, F16 c) { return fours([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
inline F16 max16(F16 a, F16 b) { return fours([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); }); }
inline F16 min16(F16 a, F16 b) { return fours([&](int i) { return vminq_f32(a.v[i], b.v[i]); }); }
inline F16 round16(F16 x) { return fours([&](int i) { return vrndnq_f32(x.v[i]); }); }
inline F16 reciprocal16(F16 x) { return set16(1.0f) / x; }

// x 2^n for whole n, by the exponent's bits; 0 where the result would not be a normal number.
inline F16 scale_by_power16(F16 x, F16 n) {
    return fours([&](int i) {
        const uint32x4_t alive = vcgeq_f32(n.v[i], vdupq_n_f32(-126.0f));
        const int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23);
        return vreinterpretq_f32_u32(vandq_u32(alive, vreinterpretq_u32_f32(vmulq_f32(x.v[i], vreinterpretq_f32_s32(bits)))));
    });
}

inline F16 floor16(F16 x) { return fours([&](int i) { return vrndmq_f32(x.v[i]); }); }
inline F16 fraction16(F16 x) { return x - floor16(x); }
inline F16 scale_by_floor16(F16 x, F16 t) { return scale_by_power16(x, floor16(t)); }  // x 2^floor(t)

inline float sum16(F16 x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]))); }
inline float top16(F16 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[2]), vmaxq_f32(x.v[1], x.v[3]))); }

inline Mask tail16(int n) {
    const int32_t first[4] = {0, 1, 2, 3};
    const int32x4_t lanes = vld1q_s32(first);
    return masks([&](int i) { return vcgtq_s32(vdupq_n_s32(n - 4 * i), lanes); });
}
inline F16 keep16(Mask mask, F16 x) { return fours([&](int i) { return vreinterpretq_f32_u32(vandq_u32(mask.v[i], vreinterpretq_u32_f32(x.v[i]))); }); }
inline F16 choose16(Mask mask, F16 x, F16 otherwise) { return fours([&](int i) { return vbslq_f32(mask.v[i], x.v[i], otherwise.v[i]); }); }
inline Mask greater16(F16 a, F16 b) { return masks([&](int i) { return vcgtq_f32(a.v[i], b.v[i]); }); }
inline Mask equal16(F16 a, F16 b) { return masks([&](int i) { return vceqq_f32(a.v[i], b.v[i]); }); }
inline Mask and16(Mask a, Mask b) { return masks([&](int i) { return vandq_u32(a.v[i], b.v[i]); }); }
inline int bits16(Mask m) {
    const uint32_t values[4] = {1, 2, 4, 8};
    const uint32x4_t weights = vld1q_u32(values);
    int bits = 0;
    for (int i = 0; i < 4; i++) bits |= int(vaddvq_u32(vandq_u32(m.v[i], weights))) << (4 * i);
    return bits;
}
inline int first16(Mask mask) { return bits16(mask) ? __builtin_ctz(bits16(mask)) : -1; }

inline F16 load16(const float* p) { return fours([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline void store16(float* p, F16 x) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}

// Rounded to nearest even.
inline uint16x4_t narrow4(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
}
inline F16 load16(const bf16* p) {
    return fours([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i), 16)); });
}
inline void store16(bf16* p, F16 x) {
    for (int i = 0; i < 4; i++) vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, narrow4(x.v[i]));
}

// What lies beyond the mask may not be readable, or writable.
template <class T>
inline F16 load16(const T* p, Mask mask) {
    const int bits = bits16(mask);
    if (bits == 0xffff) return load16(p);
    T row[16] = {};
    for (int i = 0; i < 16; i++)
        if (bits >> i & 1) row[i] = p[i];
    return load16(row);
}
template <class T>
inline void store16(T* p, F16 x, Mask mask) {
    const int bits = bits16(mask);
    if (bits == 0xffff) return store16(p, x);
    T row[16];
    store16(row, x);
    for (int i = 0; i < 16; i++)
        if (bits >> i & 1) p[i] = row[i];
}
inline void store_every_second16(bf16* p, int first, F16 x) {
    bf16 row[16];
    store16(row, x);
    for (int i = 0; i < 16; i++) p[2 * i + first] = row[i];
}

// Every second of 32 bfloat16 values, and of those from p on.
struct Words {
    uint32x4_t v[4];
};
inline F16 even_of(Words w) { return fours([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(w.v[i], 16)); }); }
inline F16 odd_of(Words w) { return fours([&](int i) { return vreinterpretq_f32_u32(vandq_u32(w.v[i], vdupq_n_u32(0xffff0000))); }); }
inline Words words_at(const char* p) {
    const auto* from = reinterpret_cast<const uint32_t*>(p);
    return {vld1q_u32(from), vld1q_u32(from + 4), vld1q_u32(from + 8), vld1q_u32(from + 12)};
}
inline F16 even_bf16(const char* p) { return even_of(words_at(p)); }
inline F16 odd_bf16(const char* p) { return odd_of(words_at(p)); }
// The words of a line of 32 channels, two inputs each, by halves.
struct WideLine {
    Words half[2];
};
inline F16 even_words(const WideLine& wide, int half) { return even_of(wide.half[half]); }
inline F16 odd_words(const WideLine& wide, int half) { return odd_of(wide.half[half]); }

}  // namespace boomerang

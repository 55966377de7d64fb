// bfloat16 in twelve bits, exactly: eight for sign and mantissa, four for the exponent.
//
// Weights of one output channel have few different exponents. A code of 1 to 15 is added to the channel's base, so that the
// largest exponent and the fourteen below it are covered; code 0 stands for exponent 0 (zeros, subnormal numbers). What is
// smaller still, about one weight in 10,000 of a normal distribution, is 0 in the panels, and `rest` says what it is: the
// products of those few are added to the sums. So a product reads three quarters of the bytes, of the same numbers.
//
// Lines lie in pairs: 64 bytes of signs and mantissas for each, then 64 of codes, the first line's in the low halves of the
// bytes. Within a line weights lie as bytes (panel_offset): interleaving bytes widens it to its halves.
#pragma once
#include <algorithm>

#include "panels.h"
#include "step.h"

namespace boomerang {

struct bf12 {
    uint8_t sign_and_mantissa;
};
constexpr int kCodes = 16, kLineWeights = 2 * kPanel;
template <>
constexpr int kLine<bf12> = kLineWeights * 3 / 2;

template <class W>
constexpr bool kIsCompressed = false;
template <>
constexpr bool kIsCompressed<bf12> = true;
template <class W>
constexpr int kLinesTogether = kIsCompressed<W> ? 2 : 1;

// What a panel needs beside its lines; nothing but for compressed weights, and `rest` for what they were widened to.
template <class W>
struct Beside {};
template <>
struct Beside<bf16> {
    const BsRest *rest = nullptr, *rest_end = nullptr;  // of the inputs that the block takes
    int first_input = 0;                               // of the block, where `rest` counts from the panel's
};
template <>
struct Beside<bf12> : Beside<bf16> {
    const uint8_t* exponents = nullptr;  // [64], in the order of a line
};

// Of `units` units of a panel, from `unit` on.
template <class W>
inline Beside<W> beside(const Weights& w, int panel, int unit, int units) {
    if constexpr (kIsCompressed<W>) {
        const int first = unit * kPerUnit<W>, last = first + units * kPerUnit<W>;
        const BsRest *begin = w.rest + w.rest_start[panel], *end = w.rest + w.rest_start[panel + 1];
        auto before = [](const BsRest& rest, int input) { return rest.input < input; };
        if (begin != end) {
            begin = std::lower_bound(begin, end, first, before);
            end = std::lower_bound(begin, end, last, before);
        }
        return {{begin, end, first}, w.exponents + panel * kLineWeights};
    }
    return {};
}

#ifdef __AVX512F__

struct Bases {
    __m512i of;
    explicit Bases(const uint8_t* exponents) : of(_mm512_loadu_si512(exponents)) {}
};

// The words of line `index` of those that begin with the pair `lines`, by halves.
inline WideLine widen_bf12(const char* lines, int index, const Bases& base) {
    const char* pair = lines + index / 2 * 2 * kLine<bf12>;
    const __m512i sign_and_mantissa = _mm512_loadu_si512(pair + index % 2 * kLineWeights), both = _mm512_loadu_si512(pair + 2 * kLineWeights);
    const __m512i code = _mm512_and_si512(index % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(kCodes - 1));
    const __m512i exponent = _mm512_maskz_add_epi8(_mm512_test_epi8_mask(code, code), code, base.of);
    // Bytes of the words: sign and upper bits of the exponent; its lowest bit and mantissa.
    const __m512i seven = _mm512_set1_epi8(0x7f);
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(exponent, 1), sign_and_mantissa, seven, 0xe4);  // seven ? first : second
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_slli_epi16(exponent, 7), sign_and_mantissa, seven, 0xd8);   // seven ? second : first
    return {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
}
inline void store_wide(char* to, const WideLine& wide) {
    for (int half = 0; half < 2; half++) _mm512_storeu_si512(to + 64 * half, wide.half[half]);
}

#elif defined(__aarch64__)

struct Bases {
    uint8x16_t of[4];
    explicit Bases(const uint8_t* exponents) {
        for (int i = 0; i < 4; i++) of[i] = vld1q_u8(exponents + 16 * i);
    }
};

inline WideLine widen_bf12(const char* lines, int index, const Bases& base) {
    const auto* pair = reinterpret_cast<const uint8_t*>(lines) + index / 2 * 2 * kLine<bf12>;
    WideLine wide;
    for (int i = 0; i < 4; i++) {
        const uint8x16_t sign_and_mantissa = vld1q_u8(pair + index % 2 * kLineWeights + 16 * i), both = vld1q_u8(pair + 2 * kLineWeights + 16 * i);
        const uint8x16_t code = index % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(kCodes - 1));
        const uint8x16_t exponent = vandq_u8(vtstq_u8(code, code), vaddq_u8(code, base.of[i])), seven = vdupq_n_u8(0x7f);
        const uint8x16_t high = vbslq_u8(seven, vshrq_n_u8(exponent, 1), sign_and_mantissa), low = vbslq_u8(seven, sign_and_mantissa, vshlq_n_u8(exponent, 7));
        wide.half[0].v[i] = vreinterpretq_u32_u8(vzip1q_u8(low, high));
        wide.half[1].v[i] = vreinterpretq_u32_u8(vzip2q_u8(low, high));
    }
    return wide;
}
inline void store_wide(char* to, const WideLine& wide) {
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++) vst1q_u32(reinterpret_cast<uint32_t*>(to + 64 * half) + 4 * i, wide.half[half].v[i]);
}

#else

struct Bases {
    __m256i of[2];
    explicit Bases(const uint8_t* exponents) {
        for (int i = 0; i < 2; i++) of[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(exponents) + i);
    }
};

inline WideLine widen_bf12(const char* lines, int index, const Bases& base) {
    const char* pair = lines + index / 2 * 2 * kLine<bf12>;
    WideLine wide;
    for (int i = 0; i < 2; i++) {
        const __m256i sign_and_mantissa = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair + index % 2 * kLineWeights) + i);
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair + 2 * kLineWeights) + i);
        const __m256i code = _mm256_and_si256(index % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(kCodes - 1));
        const __m256i none = _mm256_cmpeq_epi8(code, _mm256_setzero_si256());
        const __m256i exponent = _mm256_andnot_si256(none, _mm256_add_epi8(code, base.of[i]));
        const __m256i seven = _mm256_set1_epi8(0x7f);
        const __m256i high = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(exponent, 1), seven), _mm256_andnot_si256(seven, sign_and_mantissa));
        const __m256i low = _mm256_or_si256(_mm256_andnot_si256(seven, _mm256_slli_epi16(exponent, 7)), _mm256_and_si256(sign_and_mantissa, seven));
        wide.words[0][i] = _mm256_unpacklo_epi8(low, high);
        wide.words[1][i] = _mm256_unpackhi_epi8(low, high);
    }
    return wide;
}
inline void store_wide(char* to, const WideLine& wide) {
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 2; i++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * half) + i, wide.words[half][i]);
}

#endif

// `units` units of a panel as bfloat16, but for what is in `rest`.
inline void widen_panel(const char* lines, int units, const Beside<bf12>& beside, bf16* to) {
    const Bases base(beside.exponents);
    for (int u = 0; u < units; u++) store_wide(reinterpret_cast<char*>(to) + long(u) * kLine<bf16>, widen_bf12(lines, u, base));
}

// Adds the products of what is in `rest`; out [rows, ld] are the block's sums.
template <class X>
inline void add_rest(const Beside<bf16>& beside, const X* x, long ldx, int rows, float* out, long ld) {
    for (const BsRest* rest = beside.rest; rest != beside.rest_end; rest++) {
        const float weight = to_float(bf16{rest->bits});
        for (int r = 0; r < rows; r++) out[r * ld + rest->channel] += weight * to_float(x[r * ldx + rest->input - beside.first_input]);
    }
}

// --- packing

inline int exponent_of(bf16 x) { return x.bits >> 7 & 255; }
// Of a channel whose largest exponent is `largest`.
inline int base_of(int largest) { return std::max(largest - (kCodes - 1), 0); }
inline bool is_rest(bf16 x, int base) { return exponent_of(x) != 0 && exponent_of(x) <= base; }

// Where channel i, input j of a unit lies in a line.
inline int place_in_line(int i, int j) { return int(panel_offset<bf12>(i, j, kUnitStep)) % kLine<bf12>; }

// Bases of a panel's channels, and how many of its weights go to `rest`.
inline int measure_panel(const BsPack& m, int panel) {
    int count = 0;
    for (int i = 0; i < kPanel; i++) {
        const int row = source_row(panel * kPanel + i, m.N, m.gated);
        const bf16* values = row < 0 ? nullptr : static_cast<const bf16*>(m.source) + long(row) * m.K;
        int largest = 0;
        for (int k = 0; values && k < m.K; k++) largest = std::max<int>(largest, values[k].bits & 0x7f80);
        const int base = base_of(largest >> 7);
        for (int k = 0; values && k < m.K; k++) count += is_rest(values[k], base);
        for (int j = 0; j < 2; j++) m.exponents[long(panel) * kLineWeights + place_in_line(i, j)] = uint8_t(base);
    }
    return count;
}

// One line of bfloat16 by its parts, all in the order of a compressed line. Returns whether there is a weight without a code.
#ifdef __AVX512F__
inline bool compress_line(const bf16* wide, const uint8_t* base, uint8_t* sign_and_mantissa, uint8_t* codes) {
    const __m512i first = _mm512_loadu_si512(wide), second = _mm512_loadu_si512(wide + 32), bases = _mm512_loadu_si512(base), byte = _mm512_set1_epi16(255);
    const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
    const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
    const __m512i exponent = _mm512_ternarylogic_epi32(_mm512_add_epi8(high, high), _mm512_srli_epi16(low, 7), _mm512_set1_epi8(1), 0xd8);
    const __mmask64 has_code = _mm512_cmpgt_epu8_mask(exponent, bases), out = _mm512_test_epi8_mask(exponent, exponent) & ~has_code;
    _mm512_storeu_si512(sign_and_mantissa, _mm512_maskz_mov_epi8(~out, _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(0x7f), 0xe4)));
    _mm512_storeu_si512(codes, _mm512_maskz_sub_epi8(has_code, exponent, bases));
    return out != 0;
}
#else
inline bool compress_line(const bf16* wide, const uint8_t* base, uint8_t* sign_and_mantissa, uint8_t* codes) {
    uint8_t any = 0;
    for (int i = 0; i < kPanel; i++)
        for (int j = 0; j < 2; j++) {
            const bf16 x = wide[2 * i + j];
            const int at = place_in_line(i, j), exponent = exponent_of(x), out = is_rest(x, base[at]);
            any |= out;
            sign_and_mantissa[at] = out ? 0 : uint8_t((x.bits >> 8 & 0x80) | (x.bits & 0x7f));
            codes[at] = exponent > base[at] ? uint8_t(exponent - base[at]) : 0;
        }
    return any != 0;
}
#endif

// From a panel of bfloat16 lines.
inline void compress_panel(const BsPack& m, int panel, const bf16* wide) {
    const int units = units_of<bf12>(m.K);
    uint8_t* to = static_cast<uint8_t*>(m.target) + long(panel) * units * kLine<bf12>;
    const uint8_t* base = m.exponents + long(panel) * kLineWeights;
    BsRest* rest = m.rest + m.rest_start[panel];
    for (int u = 0; u < units; u += 2, to += 2 * kLine<bf12>) {
        uint8_t codes[2][kLineWeights];
        for (int second = 0; second < 2; second++, wide += kLineWeights) {
            if (!compress_line(wide, base, to + second * kLineWeights, codes[second])) continue;
            for (int j = 0; j < 2; j++)
                for (int i = 0; i < kPanel; i++)
                    if (is_rest(wide[2 * i + j], base[place_in_line(i, j)])) *rest++ = {2 * (u + second) + j, uint16_t(i), wide[2 * i + j].bits};
        }
        for (int at = 0; at < kLineWeights; at++) to[2 * kLineWeights + at] = uint8_t(codes[0][at] | codes[1][at] << 4);
    }
}

// Input k of channel n.
inline bf16 weight_at(const Weights& w, int n, int k) {
    const int panel = n / kPanel, u = k / 2, at = place_in_line(n % kPanel, k % 2);
    const uint8_t* pair = reinterpret_cast<const uint8_t*>(w.data) + (long(panel) * units_of<bf12>(w.K) + u / 2 * 2) * kLine<bf12>;
    const int both = pair[2 * kLineWeights + at], code = u % 2 ? both >> 4 : both & 15, bits = pair[u % 2 * kLineWeights + at];
    const int exponent = code ? code + w.exponents[panel * kLineWeights + at] : 0;
    return {uint16_t((bits & 0x80) << 8 | exponent << 7 | (bits & 0x7f))};
}

}  // namespace boomerang

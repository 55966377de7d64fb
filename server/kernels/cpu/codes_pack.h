// From the blocks of a GGUF file (ggml-common.h of llama.cpp says how they lie) to panels of codes, and single rows back.
#pragma once
#include "codes_block.h"

namespace boomerang {

inline void copy_half(uint8_t* to, int c, const uint8_t* from) { std::memcpy(to + 2 * c, from, 2); }

inline void nibbles_of(const uint8_t* bytes, uint8_t* codes) {
    for (int i = 0; i < 16; i++) codes[i] = bytes[i] & 15, codes[16 + i] = bytes[i] >> 4;
}
inline void fifth_bits_of(const uint8_t* four, uint8_t* codes) {
    uint32_t bits;
    std::memcpy(&bits, four, 4);
    for (int i = 0; i < kGroup; i++) codes[i] |= uint8_t((bits >> i & 1) << 4);
}

// One channel's group: codes [32]; its scales to `record` (of the group) and `super` (of its 256 inputs), place c of 32.
inline void read_group(const BsPack& m, int row, int g, int c, uint8_t* codes, uint8_t* record, uint8_t* super) {
    const auto* source = static_cast<const uint8_t*>(m.source);
    const long groups = groups_of(m.K), supers = groups / kGroupsInSuper, s = g / kGroupsInSuper;
    const int i = g % kGroupsInSuper;
    auto block = [&](int bytes) { return source + (row * groups + g) * bytes; };
    switch (m.type) {
        case BS_INT8: {
            const uint8_t* from = source + long(row) * m.K + g * kGroup;
            for (int k = 0; k < kGroup; k++) codes[k] = g * kGroup + k < m.K ? from[k] ^ 0x80 : 0x80;
            return;
        }
        case BS_WIDE: {
            const uint8_t* from = source + long(row) * m.K + g * kGroup;
            for (int k = 0; k < kGroup; k++) codes[k] = from[k] ^ 0x80;
            for (int part = 0; part < 2; part++) {
                const long at = row * groups * 2 + 2 * g + part;
                reinterpret_cast<float*>(record)[part * kPanel + c] = m.source_scale[at];
                reinterpret_cast<float*>(record)[(2 + part) * kPanel + c] = m.source_minimum[at];
            }
            return;
        }
        case BS_Q4_0: return copy_half(record, c, block(18)), nibbles_of(block(18) + 2, codes);
        case BS_Q4_1: return copy_half(record, c, block(20)), copy_half(record + 64, c, block(20) + 2), nibbles_of(block(20) + 4, codes);
        case BS_Q5_0: return copy_half(record, c, block(22)), nibbles_of(block(22) + 6, codes), fifth_bits_of(block(22) + 2, codes);
        case BS_Q5_1: return copy_half(record, c, block(24)), copy_half(record + 64, c, block(24) + 2), nibbles_of(block(24) + 8, codes), fifth_bits_of(block(24) + 4, codes);
        case BS_Q8_0:
            copy_half(record, c, block(34));
            for (int k = 0; k < kGroup; k++) codes[k] = block(34)[2 + k] ^ 0x80;
            return;
        case BS_Q4_K:
        case BS_Q5_K: {
            const bool five = m.type == BS_Q5_K;
            const uint8_t *b = source + (row * supers + s) * (five ? 176 : 144), *scales = b + 4;
            copy_half(super, c, b), copy_half(super + 64, c, b + 2);
            record[c] = i < 4 ? scales[i] & 63 : (scales[i + 4] & 15) | scales[i - 4] >> 6 << 4;
            record[32 + c] = i < 4 ? scales[i + 4] & 63 : scales[i + 4] >> 4 | scales[i] >> 6 << 4;
            const uint8_t* from = b + (five ? 48 : 16) + i / 2 * 32;
            for (int k = 0; k < kGroup; k++) codes[k] = from[k] >> (i % 2 * 4) & 15;
            if (five)
                for (int k = 0; k < kGroup; k++) codes[k] |= uint8_t((b[16 + k] >> i & 1) << 4);
            return;
        }
        case BS_Q6_K: {
            const uint8_t *b = source + (row * supers + s) * 210, *low = b + i / 4 * 64 + i % 2 * 32, *high = b + 128 + i / 4 * 32;
            copy_half(super, c, b + 208);
            for (int part = 0; part < 2; part++) record[32 * part + c] = b[192 + 2 * i + part];
            for (int k = 0; k < kGroup; k++) codes[k] = uint8_t((low[k] >> (i % 4 / 2 * 4) & 15) | (high[k] >> (i % 4 * 2) & 3) << 4);
            return;
        }
    }
}

template <class F>
void pack_codes_panel(const BsPack& m, int panel) {
    const int groups = groups_of(m.K);
    uint8_t* start = static_cast<uint8_t*>(m.target) + long(panel) * F::panel_bytes(groups);
    uint8_t* record = start + F::head(groups);
    std::memset(start, 0, F::head(groups));
    for (int g = 0; g < groups; g++, record += F::record) {
        alignas(64) uint32_t codes[kPanel][kGroupLines];  // four inputs each
        std::memset(record, 0, F::scale_bytes);
        for (int c = 0; c < kPanel; c++) {
            const int row = source_row(panel * kPanel + c, m.N, m.gated);
            if (row < 0)
                std::memset(codes[c], F::bits == 8 ? 0x80 : 0, kGroup);
            else
                read_group(m, row, g, c, reinterpret_cast<uint8_t*>(codes[c]), record, start + g / kGroupsInSuper * F::super_bytes);
        }
        auto* to = reinterpret_cast<uint32_t*>(record + F::scale_bytes);
        if constexpr (F::bits == 8) {
            for (int i = 0; i < kGroupLines; i++)
                for (int c = 0; c < kPanel; c++) to[i * kPanel + c] = codes[c][i];
        } else {
            constexpr int more = F::bits - 4;
            for (int i = 0; i < kGroupLines; i++)
                for (int c = 0; c < 16; c++) to[i * 16 + c] = (codes[c][i] >> more & 0x0f0f0f0f) | (codes[16 + c][i] >> more & 0x0f0f0f0f) << 4;
            to += kNibbleBytes / 4;
            for (int bit = more - 1; bit >= 0; bit--, to += kPlaneBytes / 4)
                for (int c = 0; c < kPanel; c++) {
                    to[c] = 0;
                    for (int i = 0; i < kGroupLines; i++) to[c] |= (codes[c][i] >> bit & 0x01010101) << i;
                }
        }
    }
    if (m.type == BS_INT8)
        for (int i = panel * kPanel; i < (panel + 1) * kPanel; i++) {
            const int row = source_row(i, m.N, m.gated);
            m.scale[i] = row < 0 ? 0.0f : m.source_scale[row];
        }
}

// From codes [N, K], `source_scale` as float16 [4, N, G] for 8, 6, 5 and 4 bits, `source_minimum` as the bytes of zero [N, G].
inline void pack_nested_panel(const BsPack& m, int panel) {
    constexpr int widths[] = {8, 6, 5, 4};
    const int groups = groups_of(m.K);
    auto* start = static_cast<uint8_t*>(m.target) + long(panel) * groups * kNestedRecord;
    std::memset(start, 0, size_t(groups) * kNestedRecord);
    const auto* scales = reinterpret_cast<const uint16_t*>(m.source_scale);
    const auto* zeros = reinterpret_cast<const uint8_t*>(m.source_minimum);
    auto piece = [&](int at, int size, int g) { return start + long(at) * groups + long(size) * g; };
    for (int c = 0; c < kPanel; c++) {
        const long row = source_row(panel * kPanel + c, m.N, m.gated);
        if (row < 0) continue;
        for (int g = 0; g < groups; g++) {
            const uint8_t* from = static_cast<const uint8_t*>(m.source) + row * m.K + g * kGroup;
            uint8_t *nibbles = piece(kNibblesAt, kNibbleBytes, g), *planes[4];
            for (int p = 0; p < 4; p++) planes[p] = piece(plane_at(p), kPlaneBytes, g) + c / 16 * 64;
            piece(kZeroAt, kZeroPiece, g)[c] = zeros[row * groups + g];
            for (int k = 0; k < kGroup; k++) {
                const int i = k / 4, byte = c % 16 * 4 + k % 4;
                nibbles[i * 64 + byte] |= uint8_t(from[k] >> 4 << (c < 16 ? 0 : 4));
                for (int p = 0; p < 4; p++) planes[p][byte] |= uint8_t((from[k] >> (3 - p) & 1) << i);
            }
            for (int w = 0; w < 4; w++) std::memcpy(piece(scale_at(widths[w]), kScalePiece, g) + 2 * c, scales + (w * long(m.N) + row) * groups + g, 2);
        }
    }
}

// Row `n` of nested codes, read at so many bits.
template <int bits, int centre>
void unpack_nested_row(const char* data, int n, int K, float* out) {
    const int groups = groups_of(K), c = n % kPanel;
    Packed<Form<bits, kNested, centre>> from(data + long(n / kPanel) * groups * kNestedRecord, groups);
    for (int g = 0; g < groups; g++, from.next()) {
        alignas(64) float lanes[kLanes];
        store_floats(lanes, from.raw_scale(c / kLanes));
        for (int k = 0; k < kGroup; k++) {
            const int i = k / 4, byte = c % 16 * 4 + k % 4;
            int code = from.nibbles()[i * 64 + byte] >> (c < 16 ? 0 : 4) & 15;
            for (int p = 0; p < bits - 4; p++) code = 2 * code + (from.plane(p)[c / 16 * 64 + byte] >> i & 1);
            out[g * kGroup + k] = lanes[c % kLanes] * ((1 << (8 - bits)) * (code + 0.5f) - from.zero()[c]);
        }
    }
}

// Row `n` of a packed [N, K] as float.
template <class F>
void unpack_codes_row(const char* data, const float* scale, int n, int K, float* out) {
    if constexpr (F::scales == kNested) {
        unpack_nested_row<F::bits, F::centre>(data, n, K, out);
    } else {
        const int groups = groups_of(K), c = n % kPanel, v = c / kLanes, half = c / 16, at = c % 16 * 4;
        Packed<F> from(data + n / kPanel * F::panel_bytes(groups), groups);
        for (int g = 0; g < groups; g++, from.next()) {
            float scales[F::parts], minima[F::parts];
            for (int part = 0; part < F::parts; part++) {
                alignas(64) float lanes[2][kLanes];
                store_floats(lanes[0], from.scale(part, v)), store_floats(lanes[1], from.minimum(part, v));
                scales[part] = F::scales == kChannel ? scale[n] : lanes[0][c % kLanes], minima[part] = lanes[1][c % kLanes];
            }
            const uint8_t* codes = from.record + F::scale_bytes;
            for (int k = 0; k < std::min(kGroup, K - g * kGroup); k++) {
                const int i = k / 4, byte = at + k % 4, part = F::parts == 1 ? 0 : k / 16;
                int code;
                if constexpr (F::bits == 8) {
                    code = codes[(2 * i + half) * 64 + byte];
                } else {
                    code = codes[i * 64 + byte] >> (4 * half) & 15;
                    for (int bit = 0; bit < F::bits - 4; bit++) code = 2 * code + (codes[kNibbleBytes + bit * kPlaneBytes + half * 64 + byte] >> i & 1);
                }
                if constexpr (F::centre >= 0) code -= 1 << std::max(F::centre, 0);
                out[g * kGroup + k] = float(code) * scales[part] + minima[part];
            }
        }
    }
}

}  // namespace boomerang

// Weights in codes of 4, 5, 6 and 8 bits with a scale per group of inputs, as GGUF files have them: how they lie in panels.
//
// A panel has a record for each group of 32 inputs: scales of its 32 channels, then codes in planes. The plane of nibbles
// has a line of 64 bytes per four inputs: byte 4 c + j is input j, channel c in the low half and channel 16 + c in the high
// one. Further bits of a code, lower ones, are planes of their own: 64 bytes for 16 channels, bit i of a byte for line i.
// Codes of eight bits lie as bytes, 64 for 16 channels. What is common to 256 inputs (the K types) stands before the records.
//
// code = nibble * 2^(bits - 4) + further bits; weight = scale * (code - centre) + minimum.
#pragma once
#include "bytes.h"
#include "panels.h"

namespace boomerang {

struct Codes {  // the type of weights that are codes, or whatever `type` of each matrix says
    uint8_t byte;
};

// How far ahead of its use a weight is fetched into the second-level cache when all rows are one block; measured. With
// several blocks each fetches its share of the next panel, so that memory and arithmetic overlap. Matrices lie in the
// order in which a step reads them, so what is fetched beyond the end of one is the beginning of the next.
constexpr long kAhead = 8192;

constexpr int kGroup = 32, kGroupLines = kGroup / 4, kGroupsInSuper = 8;
constexpr int kNibbleBytes = kGroupLines * 64, kPlaneBytes = 128;

enum Scales {
    kHalf,        // float16
    kHalfMin,     // float16, and a minimum
    kTwoLevel,    // 6 bits and 6 bits of minimum, times two float16 of 256 inputs
    kTwoLevel16,  // signed bytes of 16 inputs, times a float16 of 256 inputs
    kChannel,     // none: the sums are scaled by channel
    kWide,        // float and minimum, of 16 inputs
    kNested,      // float16 for each width, and the place of zero: codes_nested.h
};

template <int bits_, Scales scales_, int centre_>
struct Form {
    static constexpr int bits = bits_, centre = centre_;  // centre: its power of two, -1 for none
    static constexpr Scales scales = scales_;
    static constexpr bool has_minimum = scales == kHalfMin || scales == kTwoLevel || scales == kWide || scales == kNested;
    static constexpr int parts = scales == kTwoLevel16 || scales == kWide ? 2 : 1;  // of a group, with scales of their own
    static constexpr int scale_bytes = scales == kHalf ? 64 : scales == kHalfMin ? 128 : scales == kChannel ? 0 : scales == kWide ? 512 : 64;
    static constexpr int super_bytes = scales == kTwoLevel ? 128 : scales == kTwoLevel16 ? 64 : 0;
    static constexpr int code_bytes = bits == 8 ? 1024 : kNibbleBytes + (bits - 4) * kPlaneBytes;
    static constexpr int record = scales == kNested ? 1312 : scale_bytes + code_bytes;  // of a group
    static constexpr long head(int groups) { return long(super_bytes) * ((groups + kGroupsInSuper - 1) / kGroupsInSuper); }
    static constexpr long panel_bytes(int groups) { return head(groups) + long(record) * groups; }
};

// body(form) for the form of a type; false if the type is none of codes.
template <class Body>
inline bool with_form(int type, Body&& body) {
    switch (type) {
        case BS_INT8: return body(Form<8, kChannel, 7>{}), true;
        case BS_Q4_0: return body(Form<4, kHalf, 3>{}), true;
        case BS_Q4_1: return body(Form<4, kHalfMin, -1>{}), true;
        case BS_Q5_0: return body(Form<5, kHalf, 4>{}), true;
        case BS_Q5_1: return body(Form<5, kHalfMin, -1>{}), true;
        case BS_Q8_0: return body(Form<8, kHalf, 7>{}), true;
        case BS_Q4_K: return body(Form<4, kTwoLevel, -1>{}), true;
        case BS_Q5_K: return body(Form<5, kTwoLevel, -1>{}), true;
        case BS_Q6_K: return body(Form<6, kTwoLevel16, 5>{}), true;
        case BS_NESTED_4: return body(Form<4, kNested, -1>{}), true;
        case BS_NESTED_5: return body(Form<5, kNested, -1>{}), true;
        case BS_NESTED_6: return body(Form<6, kNested, -1>{}), true;
        case BS_NESTED_8: return body(Form<8, kNested, 7>{}), true;
        case BS_WIDE: return body(Form<8, kWide, 7>{}), true;
        default: return false;
    }
}

inline int groups_of(int K) { return chunks_for(K, kGroup); }

inline long coded_panel_bytes(int type, int K) {
    long bytes = 0;
    with_form(type, [&](auto form) { bytes = form.panel_bytes(groups_of(K)); });
    return bytes;
}

// Lines of eight as constants: body(std::integral_constant<int, i>).
template <int from, int to, class Body>
constexpr inline __attribute__((always_inline)) void each_line(Body&& body) {
    if constexpr (from < to) {
        body(std::integral_constant<int, from>{});
        each_line<from + 1, to>(body);
    }
}

// Reads a packed panel group by group.
template <class F>
struct Packed {
    using Form = F;
    const uint8_t *start, *record;
    int groups, group = 0;
    Packed(const char* panel, int groups) : start(reinterpret_cast<const uint8_t*>(panel)), record(start + F::head(groups)), groups(groups) {}
    void next() { record += F::record, group++; }
    static long first(int) { return 0; }  // where what is read of a panel begins, and ends
    static long reach(int groups) { return F::panel_bytes(groups); }
    const uint8_t* here() const { return record; }

    struct Lower {};  // what vector v of all lines has in common
    template <int v>
    Lower lower() const { return {}; }
    // Codes of line i, vector v of the panel's.
    template <int i, int v>
    Bytes code(Lower = {}) const {
        constexpr int half = v * kLanes / 16, at = v * kLanes % 16 * 4;
        const uint8_t* codes = record + F::scale_bytes + at;
        if constexpr (F::bits == 8) return load_bytes(codes + (2 * i + half) * 64);
        constexpr int more = F::bits - 4;
        Bytes code = both(shifted<half ? more - 4 : more>(load_bytes(codes + i * 64)), every_byte(15 << more));
        if constexpr (more >= 1) code = with(code, both(shifted<more - 1 - i>(load_bytes(codes + kNibbleBytes + half * 64)), every_byte(1 << (more - 1))));
        if constexpr (more >= 2) code = with(code, both(shifted<more - 2 - i>(load_bytes(codes + kNibbleBytes + kPlaneBytes + half * 64)), every_byte(1 << (more - 2))));
        return code;
    }
    Floats scale(int part, int v) const {
        const uint8_t* super = start + group / kGroupsInSuper * F::super_bytes;
        if constexpr (F::scales == kHalf || F::scales == kHalfMin) return load_halves(record + 2 * v * kLanes);
        if constexpr (F::scales == kTwoLevel) return load_u8(record + v * kLanes) * load_halves(super + 2 * v * kLanes);
        if constexpr (F::scales == kTwoLevel16) return load_i8(record + 32 * part + v * kLanes) * load_halves(super + 2 * v * kLanes);
        if constexpr (F::scales == kWide) return load_floats(reinterpret_cast<const float*>(record) + 32 * part + v * kLanes);
        return every_float(1.0f);
    }
    Floats minimum(int part, int v) const {
        const uint8_t* super = start + group / kGroupsInSuper * F::super_bytes;
        if constexpr (F::scales == kHalfMin) return load_halves(record + 64 + 2 * v * kLanes);
        if constexpr (F::scales == kTwoLevel) return no_floats() - load_u8(record + 32 + v * kLanes) * load_halves(super + 64 + 2 * v * kLanes);
        if constexpr (F::scales == kWide) return load_floats(reinterpret_cast<const float*>(record) + 64 + 32 * part + v * kLanes);
        return no_floats();
    }
};

}  // namespace boomerang

#include "codes_nested.h"

namespace boomerang {

// What a panel is widened to once for many rows: bytes of codes, then floats. Where fours of bytes are multiplied at once the
// width does not matter, and codes get one common centre.
template <class F>
using WideForm = Form<kFours ? 8 : F::bits, F::scales == kTwoLevel || F::scales == kNested ? kHalfMin : F::scales, F::centre < 0 ? -1 : kFours ? 7 : F::centre>;

// Reads a widened panel.
template <class F>
struct Widened {
    using Form = F;
    static constexpr int kFloats = F::scales == kChannel ? 0 : (F::has_minimum ? 2 : 1) * F::parts * kPanel;
    static constexpr long kRecord = 1024 + 4 * kFloats;
    const uint8_t* record;
    Widened(const char* panel, int) : record(reinterpret_cast<const uint8_t*>(panel)) {}
    void next() { record += kRecord; }

    struct Lower {};
    template <int v>
    Lower lower() const { return {}; }
    template <int i, int v>
    Bytes code(Lower = {}) const { return load_bytes(record + (2 * i + v * kLanes / 16) * 64 + v * kLanes % 16 * 4); }
    Floats scale(int part, int v) const {
        if constexpr (F::scales == kChannel) return every_float(1.0f);
        return load_floats(reinterpret_cast<const float*>(record + 1024) + part * kPanel + v * kLanes);
    }
    Floats minimum(int part, int v) const {
        if constexpr (!F::has_minimum) return no_floats();
        return load_floats(reinterpret_cast<const float*>(record + 1024) + (F::parts + part) * kPanel + v * kLanes);
    }
};

template <class F>
void widen_codes(const char* panel, int groups, uint8_t* to) {
    using W = Widened<WideForm<F>>;
    constexpr int vectors = kPanel / kLanes, shift = F::centre < 0 ? 0 : (1 << WideForm<F>::centre) - (1 << F::centre);
    Packed<F> from(panel, groups);
    for (int g = 0; g < groups; g++, from.next(), to += W::kRecord) {
        each_line<0, vectors>([&](auto v) {
            const auto low = from.template lower<v>();
            each_line<0, kGroupLines>([&](auto i) {
                Bytes codes = from.template code<i, v>(low);
                if constexpr (shift != 0) codes = plus8(codes, every_byte(shift));
                store_bytes(to + (2 * i + v * kLanes / 16) * 64 + v * kLanes % 16 * 4, codes);
            });
        });
        float* floats = reinterpret_cast<float*>(to + 1024);
        if constexpr (W::kFloats > 0)
            for (int part = 0; part < F::parts; part++)
                for (int v = 0; v < vectors; v++) {
                    store_floats(floats + part * kPanel + v * kLanes, from.scale(part, v));
                    if constexpr (F::has_minimum) store_floats(floats + (F::parts + part) * kPanel + v * kLanes, from.minimum(part, v));
                }
    }
}

}  // namespace boomerang

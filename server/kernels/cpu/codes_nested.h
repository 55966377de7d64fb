// Nested codes (model_store/nested.py): one 8-bit parent, read at 4, 5, 6 or 8 bits; included by codes.h.
//
// A panel is ten streams, each with a piece for every group of 32 inputs: scales of each width, the place of zero, the plane of
// nibbles, and the planes of single bits. They lie so that what a reader of any width wants is nearly one run of bytes: at most
// one stream of other scales is in it. Within a piece planes lie as codes.h says.
//
// weight = scale * (2^(8 - bits) * (code + 1/2) - zero).
#pragma once

namespace boomerang {

constexpr int kZeroPiece = kPanel, kScalePiece = 2 * kPanel;
constexpr int kNestedRecord = kZeroPiece + 4 * kScalePiece + kNibbleBytes + 4 * kPlaneBytes;  // of a group, all streams together

// Where streams begin, in bytes for each group of the panel: scales of 5 bits, of 4, zero, nibbles, planes 0 and 1 below the
// nibbles (the highest bit first), scales of 6, planes 2 and 3, scales of 8.
constexpr int kZeroAt = 2 * kScalePiece, kNibblesAt = kZeroAt + kZeroPiece;
constexpr int plane_at(int p) { return kNibblesAt + kNibbleBytes + p * kPlaneBytes + (p < 2 ? 0 : kScalePiece); }
constexpr int scale_at(int bits) { return bits == 5 ? 0 : bits == 4 ? kScalePiece : plane_at(bits == 6 ? 1 : 3) + kPlaneBytes; }
static_assert(plane_at(2) == scale_at(6) + kScalePiece && kNestedRecord == scale_at(8) + kScalePiece, "streams follow each other");

// What a reader of so many bits wants, from and to.
constexpr int nested_from(int bits) { return bits > 5 ? kZeroAt : scale_at(bits); }
constexpr int nested_to(int bits) { return bits > 5 ? scale_at(bits) + kScalePiece : plane_at(bits - 4); }

template <int bits, int centre>
struct Packed<Form<bits, kNested, centre>> {
    using Form = boomerang::Form<bits, kNested, centre>;
    static constexpr int more = bits - 4;
    const uint8_t* panel;
    int groups, group = 0;
    Packed(const char* panel, int groups) : panel(reinterpret_cast<const uint8_t*>(panel)), groups(groups) {}
    void next() { group++; }
    static long first(int groups) { return long(nested_from(bits)) * groups; }
    static long reach(int groups) { return long(nested_to(bits)) * groups; }
    const uint8_t* piece(int at, int size) const { return panel + long(at) * groups + long(size) * group; }
    const uint8_t* zero() const { return piece(kZeroAt, kZeroPiece); }
    const uint8_t* nibbles() const { return piece(kNibblesAt, kNibbleBytes); }
    const uint8_t* plane(int p) const { return piece(plane_at(p), kPlaneBytes); }

    // The bits below the nibbles of vector v, of all lines of the group. Where there are two planes or four their bits are
    // brought together once for all lines, not plane by plane for each.
    struct Lower {
        Bytes of[more ? more : 1];
    };
    template <int v>
    Lower lower() const {
        constexpr int half = v * kLanes / 16, at = v * kLanes % 16 * 4;
        Lower low;
        each_line<0, more>([&](auto p) { low.of[p] = load_bytes(plane(p) + half * 64 + at); });
        if constexpr (more % 2 == 0)
            each_line<0, more / 2>([&](auto pair) {  // of even lines, then of odd ones: two bits of a line side by side
                const Bytes high = low.of[2 * pair], low_bit = low.of[2 * pair + 1], upper = every_byte(0xaa);
                low.of[2 * pair] = chosen(upper, shifted<1>(high), low_bit);
                low.of[2 * pair + 1] = chosen(upper, high, shifted<-1>(low_bit));
            });
        if constexpr (more == 4) {  // four bits: lines 0 and 4, 1 and 5, 2 and 6, 3 and 7
            const Bytes a0 = low.of[0], a1 = low.of[1], b0 = low.of[2], b1 = low.of[3], upper = every_byte(0xcc);
            low = {{chosen(upper, shifted<2>(a0), b0), chosen(upper, shifted<2>(a1), b1), chosen(upper, a0, shifted<-2>(b0)), chosen(upper, a1, shifted<-2>(b1))}};
        }
        return low;
    }

    template <int i, int v>
    Bytes code(const Lower& low) const {
        constexpr int half = v * kLanes / 16, at = v * kLanes % 16 * 4;
        const Bytes high = shifted<half ? more - 4 : more>(load_bytes(nibbles() + at + i * 64)), mask = every_byte(15 << more);
        if constexpr (more == 4) return chosen(mask, high, shifted<-(i / 4 * 4)>(low.of[i % 4]));
        if constexpr (more == 2) return chosen(mask, high, both(shifted<-(i / 2 * 2)>(low.of[i % 2]), every_byte(3)));
        Bytes code = both(high, mask);
        each_line<0, more>([&](auto p) {
            constexpr int bit = more - 1 - p;
            code = with(code, both(shifted<bit - i>(low.of[p]), every_byte(1 << bit)));
        });
        return code;
    }
    Floats raw_scale(int v) const { return load_halves(piece(scale_at(bits), kScalePiece) + 2 * v * kLanes); }
    Floats scale(int, int v) const { return raw_scale(v) * every_float(1 << (8 - bits)); }
    Floats minimum(int, int v) const {
        constexpr float half = (1 << (8 - bits)) / 2.0f, shift = centre < 0 ? 0 : 1 << (centre < 0 ? 0 : centre);
        return raw_scale(v) * (every_float(half + shift) - load_u8(zero() + v * kLanes));
    }
};

}  // namespace boomerang

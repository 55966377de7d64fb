// The one kernel: a block of sums, some rows of activations times one panel of weights.
//
// out[row][32] = sum over terms of x[row] . panel. Several terms add up in registers: the pages of an attention block.
#pragma once
#include <algorithm>

#include "panels.h"

namespace boomerang {

// Activations are kept in the type that the processor multiplies with weights of type W.
template <class W>
struct ActivationOf {
    using type = float;
};
#ifdef __AVX512BF16__
template <>
struct ActivationOf<bf16> {
    using type = bf16;
};
template <>
struct ActivationOf<int8> {
    using type = bf16;
};
#endif
template <class W>
using Act = typename ActivationOf<W>::type;

constexpr int kMostTerms = 8;  // of one block

// What to fetch into a cache along the way: `bytes` per kUnitStep units. `once`: they are read once and soon, and should
// not drive out of the second-level cache what else is there (on Zen 5 that is worth 2 to 4 % of a decode step, the
// interpreter's part among it; on processors with AMX it was not measured).
struct Ahead {
    const char* from = nullptr;
    int bytes = 0;
    bool once = false;
};

#ifdef __AMX_BF16__
constexpr bool kPastSecondLevel = false;
#else
constexpr bool kPastSecondLevel = true;
#endif

template <class W>
struct Term {
    const Act<W>* x;  // [rows, ldx], zeros from K to units
    long ldx;
    const char* panel;
    int units;
    Ahead ahead = {};
};

// One unit of 16 channels as the processor multiplies it: `load` from a line, `fma` with one unit of a row of x.
template <class W>
struct Operand;
template <>
struct Operand<float> {
    F16 w;
    static Operand load(const char* p) { return {load16(reinterpret_cast<const float*>(p))}; }
    F16 fma(F16 sum, const float* x) const { return fma16(set16(*x), w, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Operand<bf16> {
    __m512i w;
    static Operand load(const char* p) { return {_mm512_loadu_si512(p)}; }
    F16 fma(F16 sum, const bf16* x) const {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
    }
};
// int8 is exact in bfloat16: sign and two bytes looked up by magnitude.
struct WideLine {
    __m512i half[2];
};
inline WideLine widen_int8(const char* line) {
    alignas(64) static const struct Tables {
        uint8_t high[128], low[128];
        Tables() {
            for (int i = 0; i < 128; i++) {
                const float value = float(i);
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                high[i] = uint8_t(bits >> 24), low[i] = uint8_t(bits >> 16);
            }
        }
    } tables;
    const __m512i w = _mm512_loadu_si512(line), magnitude = _mm512_abs_epi8(w);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(tables.low), magnitude, _mm512_load_si512(tables.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(tables.high), magnitude, _mm512_load_si512(tables.high + 64));
    const __m512i top = _mm512_ternarylogic_epi32(high, w, _mm512_set1_epi8(char(0x80)), 0xf8);  // high | (w & 0x80)
    return {{_mm512_unpacklo_epi8(low, top), _mm512_unpackhi_epi8(low, top)}};
}
template <>
struct Operand<int8> {
    __m512i w;
    F16 fma(F16 sum, const bf16* x) const { return Operand<bf16>{w}.fma(sum, x); }
};
#else
template <>
struct Operand<bf16> {
    F16 even, odd;
    static Operand load(const char* p) {
        return {even_bf16(p), odd_bf16(p)};
    }
    F16 fma(F16 sum, const float* x) const { return fma16(set16(x[1]), odd, fma16(set16(x[0]), even, sum)); }
};
template <>
struct Operand<int8> {
    F16 even, odd;
    F16 fma(F16 sum, const float* x) const { return fma16(set16(x[1]), odd, fma16(set16(x[0]), even, sum)); }
};
#endif

// Halves [first, first + H) of a line as operands.
template <class W, int H>
inline void load_line(const char* line, int first, Operand<W>* w) {
    for (int h = 0; h < H; h++) w[h] = Operand<W>::load(line + (first + h) * (kLine<W> / 2));
}
template <int H>
inline void load_line(const char* line, int first, Operand<int8>* w) {
#ifdef __AVX512BF16__
    const WideLine wide = widen_int8(line);
    for (int h = 0; h < H; h++) w[h] = {wide.half[first + h]};
#else
    for (int h = 0; h < H; h++) w[h] = {even_int8(line, first + h), odd_int8(line, first + h)};
#endif
}

#ifdef __AVX512F__
constexpr int kHalves = 2, kRegisterRows = 12;
#else
constexpr int kHalves = 1, kRegisterRows = 4;  // with sixteen registers half a panel is all that fits
#endif

// R rows; S sums per output, so that enough of them are on their way at once; H halves of the panel at a time.
template <class W, int R, int S, int H>
void block_rows(const Term<W>* terms, int num_terms, int first_half, float* out, long ld, bool add) {
    F16 acc[S][R][H];
    for (int s = 0; s < S; s++)
        for (int r = 0; r < R; r++)
            for (int h = 0; h < H; h++) acc[s][r][h] = zero16();
    for (const Term<W>* t = terms; t < terms + num_terms; t++) {
        const char *line = t->panel, *next = t->ahead.from;
        const Act<W>* x = t->x;
        const int share = first_half == 0 ? t->ahead.bytes * S / kUnitStep : 0;  // not twice
        for (int u = 0; u < t->units; u += S, line += S * kLine<W>, x += S * kPerUnit<W>) {
            // Spread out: a burst of prefetches holds up the loads behind it.
            if (kPastSecondLevel && t->ahead.once)
                for (int i = 0; i < share; i += 64) _mm_prefetch(next + i, _MM_HINT_NTA);
            else
                for (int i = 0; i < share; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
            next += share;
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                Operand<W> w[H];
                if constexpr (sizeof(W) == 1)
                    load_line<H>(line + s * kLine<W>, first_half, w);
                else
                    load_line<W, H>(line + s * kLine<W>, first_half, w);
#pragma GCC unroll 12
                for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                    for (int h = 0; h < H; h++) acc[s][r][h] = w[h].fma(acc[s][r][h], x + r * t->ldx + s * kPerUnit<W>);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++) {
            F16 sum = acc[0][r][h];
            float* to = out + r * ld + 16 * (first_half + h);
            for (int s = 1; s < S; s++) sum = sum + acc[s][r][h];
            store16(to, add ? sum + load16(to) : sum);
        }
}

template <class W, int R, int S>
void block_of(const Term<W>* terms, int num_terms, float* out, long ld, bool add) {
    block_rows<W, R, S, kHalves>(terms, num_terms, 0, out, ld, add);
    if constexpr (kHalves == 1) block_rows<W, R, S, kHalves>(terms, num_terms, 1, out, ld, add);
}

// Up to kRegisterRows rows without tiles.
template <class W>
void block_in_registers(const Term<W>* terms, int num_terms, int rows, float* out, long ld, bool add) {
    switch (rows) {
        case 1: return block_of<W, 1, kHalves == 2 ? 4 : 2>(terms, num_terms, out, ld, add);
        case 2: return block_of<W, 2, kHalves == 2 ? 2 : 1>(terms, num_terms, out, ld, add);
        case 3: return block_of<W, 3, kHalves == 2 ? 2 : 1>(terms, num_terms, out, ld, add);
        case 4: return block_of<W, 4, kHalves == 2 ? 2 : 1>(terms, num_terms, out, ld, add);
#ifdef __AVX512F__
        case 5: return block_of<W, 5, 2>(terms, num_terms, out, ld, add);
        case 6: return block_of<W, 6, 1>(terms, num_terms, out, ld, add);
        case 7: return block_of<W, 7, 1>(terms, num_terms, out, ld, add);
        case 8: return block_of<W, 8, 1>(terms, num_terms, out, ld, add);
        case 9: return block_of<W, 9, 1>(terms, num_terms, out, ld, add);
        case 10: return block_of<W, 10, 1>(terms, num_terms, out, ld, add);
        case 11: return block_of<W, 11, 1>(terms, num_terms, out, ld, add);
        default: return block_of<W, 12, 1>(terms, num_terms, out, ld, add);
#endif
    }
}

}  // namespace boomerang

#include "tiles.h"

namespace boomerang {

// Most rows of one block.
template <class W>
constexpr int kBlockRows = kHasTiles<W> ? 32 : kRegisterRows;

// Rows of the next block when `rows` are left: equal blocks rather than a full one and a sliver.
template <class W>
inline int block_size(int rows) {
    const int blocks = (rows + kBlockRows<W> - 1) / kBlockRows<W>;
    return kHasTiles<W> ? std::min(rows, 32) : (rows + blocks - 1) / blocks;
}

struct Nothing {
    void operator()() const {}
};

// `add`: to what is there. `between`: called once for every kUnitStep units while tiles are at work, which leave the vector
// units idle; never where there are no tiles.
template <class W, bool add = false, class Between = Nothing>
inline void block(const Term<W>* terms, int num_terms, int rows, float* out, long ld, TileState& tiles, Between&& between = {}) {
    if constexpr (kHasTiles<W>) {
        if (rows >= kTileRows) return block_in_tiles<add>(terms, num_terms, rows, out, ld, tiles, between);
    }
    block_in_registers<W>(terms, num_terms, rows, out, ld, add);
}

}  // namespace boomerang

// The one kernel: a block of sums, some rows of activations times one panel of weights.
//
// out[row][32] = sum over terms of x[row] . panel. Several terms add up in registers: the pages of an attention block.
// Without tiles a row's sums are those that it has alone, whatever rows are with it: one sum per output, from the first input
// to the last. So a guess is verified by the very numbers of a step without guesses.
#pragma once
#include <algorithm>

#include "compressed.h"
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
struct ActivationOf<bf12> {
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
    Beside<W> beside = {};
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
#else
template <>
struct Operand<bf16> {
    F16 even, odd;
    static Operand load(const char* p) {
        return {even_bf16(p), odd_bf16(p)};
    }
    F16 fma(F16 sum, const float* x) const { return fma16(set16(x[1]), odd, fma16(set16(x[0]), even, sum)); }
};
#endif
template <>
struct Operand<bf12> : Operand<bf16> {};

// Halves [first, first + H) of line `index` as operands, of lines that follow each other.
template <class W>
struct Lines {
    explicit Lines(const Term<W>&) {}
    template <int H>
    void load(const char* lines, int index, int first, Operand<W>* w) const {
        for (int h = 0; h < H; h++) w[h] = Operand<W>::load(lines + index * kLine<W> + (first + h) * (kLine<W> / 2));
    }
};
template <>
struct Lines<bf12> {
    Bases base;
    explicit Lines(const Term<bf12>& term) : base(term.beside.exponents) {}
    template <int H>
    void load(const char* lines, int index, int first, Operand<bf12>* w) const {
        const WideLine wide = widen_bf12(lines, index, base);
#ifdef __AVX512BF16__
        for (int h = 0; h < H; h++) w[h].w = wide.half[H == 2 ? h : first + h];
#else
        for (int h = 0; h < H; h++) w[h].even = even_words(wide, first + h), w[h].odd = odd_words(wide, first + h);
#endif
    }
};

#ifdef __AVX512F__
constexpr int kHalves = 2, kRegisterRows = 12;
#else
constexpr int kHalves = 1, kRegisterRows = 4;  // with sixteen registers half a panel is all that fits
#endif

// The products of line `index` with its unit of R rows of x.
template <class W, int R, int H>
inline void add_line(F16 (&acc)[R][H], const Lines<W>& lines, const char* from, int index, int first_half, const Act<W>* x, long ldx) {
    Operand<W> w[H];
    lines.template load<H>(from, index, first_half, w);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int h = 0; h < H; h++) acc[r][h] = w[h].fma(acc[r][h], x + r * ldx + index * kPerUnit<W>);
}

// R rows, H halves of the panel at a time.
template <class W, int R, int H>
void block_rows(const Term<W>* terms, int num_terms, int first_half, float* out, long ld, bool add) {
    constexpr int L = kLinesTogether<W>;
    F16 acc[R][H];
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++) acc[r][h] = zero16();
    for (const Term<W>* t = terms; t < terms + num_terms; t++) {
        const char *line = t->panel, *next = t->ahead.from;
        const Act<W>* x = t->x;
        const int share = first_half == 0 ? t->ahead.bytes * L / kUnitStep : 0;  // not twice
        const Lines<W> lines(*t);
        for (int u = 0; u < t->units; u += L, line += L * kLine<W>, x += L * kPerUnit<W>) {
            // Spread out: a burst of prefetches holds up the loads behind it.
            if (kPastSecondLevel && t->ahead.once)
                for (int i = 0; i < share; i += 64) prefetch_once(next + i);
            else
                for (int i = 0; i < share; i += 64) prefetch_second(next + i);
            next += share;
            add_line<W, R, H>(acc, lines, line, 0, first_half, x, t->ldx);  // no loop: gcc keeps sums in memory that two lines of one share
            if constexpr (L == 2) add_line<W, R, H>(acc, lines, line, 1, first_half, x, t->ldx);
        }
    }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++) {
            float* to = out + r * ld + 16 * (first_half + h);
            store16(to, add ? acc[r][h] + load16(to) : acc[r][h]);
        }
}

template <class W, int R>
void block_of(const Term<W>* terms, int num_terms, float* out, long ld, bool add) {
    block_rows<W, R, kHalves>(terms, num_terms, 0, out, ld, add);
    if constexpr (kHalves == 1) block_rows<W, R, kHalves>(terms, num_terms, 1, out, ld, add);
}

// Up to kRegisterRows rows without tiles.
template <class W>
void block_in_registers(const Term<W>* terms, int num_terms, int rows, float* out, long ld, bool add) {
    switch (rows) {
        case 1: return block_of<W, 1>(terms, num_terms, out, ld, add);
        case 2: return block_of<W, 2>(terms, num_terms, out, ld, add);
        case 3: return block_of<W, 3>(terms, num_terms, out, ld, add);
        case 4: return block_of<W, 4>(terms, num_terms, out, ld, add);
#ifdef __AVX512F__
        case 5: return block_of<W, 5>(terms, num_terms, out, ld, add);
        case 6: return block_of<W, 6>(terms, num_terms, out, ld, add);
        case 7: return block_of<W, 7>(terms, num_terms, out, ld, add);
        case 8: return block_of<W, 8>(terms, num_terms, out, ld, add);
        case 9: return block_of<W, 9>(terms, num_terms, out, ld, add);
        case 10: return block_of<W, 10>(terms, num_terms, out, ld, add);
        case 11: return block_of<W, 11>(terms, num_terms, out, ld, add);
        default: return block_of<W, 12>(terms, num_terms, out, ld, add);
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
inline int block_size(int rows, bool in_registers = false) {
    return kHasTiles<W> && !in_registers ? std::min(rows, 32) : chunks_for(rows, chunks_for(rows, kRegisterRows));
}

struct Nothing {
    void operator()() const {}
};

// `add`: to what is there. `between`: called once for every kUnitStep units while tiles are at work, which leave the vector
// units idle; never where there are no tiles.
template <bool add, class W, class Between = Nothing>
inline void block(const Term<W>* terms, int num_terms, int rows, float* out, long ld, TileState& tiles, Between&& between = {}) {
    bool is_done = false;
    if constexpr (kHasTiles<W> && sizeof(W) == 2)  // narrower ones come here for single rows only (kDirectRows)
        if ((is_done = rows >= kTileRows && !tiles.are_off)) block_in_tiles<add>(terms, num_terms, rows, out, ld, tiles, between);
    if (!is_done) block_in_registers<W>(terms, num_terms, rows, out, ld, add);
    if constexpr (sizeof(W) < 4)
        for (int i = 0; i < num_terms; i++) add_rest(terms[i].beside, terms[i].x, terms[i].ldx, rows, out, ld);
}

}  // namespace boomerang

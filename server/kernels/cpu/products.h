// Products of activations with packed weights, cut into panels; what becomes of the sums is the caller's `sink`.
#pragma once
#include "block.h"
#include "buffer.h"
#include "codes_pack.h"

namespace boomerang {

// Blocks of rows times panels, or pieces of them: what is fetched while block `index` of `blocks` runs. `steps`: of
// kUnitStep units each, of the block. `next`: what the blocks after these read, `bytes` of it, and whether they come `at_once`.
template <class W>
inline Ahead ahead_of(const char* next, long bytes, int steps, int blocks, int index, bool at_once = true) {
    if (blocks == 1) return {next - bytes + kAhead, kUnitStep * kLine<W>, at_once};
    const int share = round_up(chunks_for(bytes, blocks * steps), 64);
    const long from = long(index) * steps * share;
    return from < bytes ? Ahead{next + from, share} : Ahead{};
}

// Rows [M, ldx] of activations.
template <class W>
struct Rows {
    const Act<W>* x;
    long ldx;
    int M;
    bool in_registers = false;  // no tiles: each row gets the sums that it has alone
};

// Activations for codes: rounded, and as they were where a matrix of the model is no codes or codes are multiplied exactly.
template <>
struct Rows<Codes> {
    const float* x;
    long ldx;
    int M;
    RoundedRows rounded;
    const Act<bf16>* plain;
    long ld_plain;
    bool exact;
    bool in_registers = false;
    const uint8_t* widths = nullptr;  // [M], or null: all BS_EXACT
};

// Rows from row `m` on, and the same rows from input `k` on, a multiple of 32.
template <class W>
inline Rows<W> from_row(Rows<W> x, int m) {
    x.x += m * x.ldx, x.M -= m;
    if constexpr (std::is_same<W, Codes>::value) {
        x.rounded.codes += m * x.rounded.ldc, x.rounded.blocks += m * x.rounded.ldb;
        if (x.plain) x.plain += m * x.ld_plain;
        if (x.widths) x.widths += m;
    }
    return x;
}
template <class W>
inline Rows<W> from_input(Rows<W> x, int k) {
    x.x += k;
    if constexpr (std::is_same<W, Codes>::value) {
        x.rounded.codes += k, x.rounded.blocks += k / kGroup;
        if (x.plain) x.plain += k;
    }
    return x;
}

// A part of a product: rows [row0, row1) by panels [panel0, panel1), of which units [unit0, unit1) if they are not all;
// rows of x begin with unit0. `then`: what is read after it, where that is not what follows in memory; of nested codes,
// `then_nested`. `alone`: nothing else is read before that, so that what is fetched for it may go past the second-level cache.
struct Part {
    int row0, row1, panel0, panel1;
    int unit0 = 0, unit1 = 0;
    const char *then = nullptr, *then_nested = nullptr;
    bool alone = true;
};

// The most units of a panel that stay in the first-level cache while blocks of rows pass by.
constexpr int kMostUnits = 288;
// Bytes of activations that the second-level cache keeps while the panels of a chunk pass by.
constexpr long kGroupBytes = 1 << 20;

// Units of the pieces that the depth of a product is cut into.
inline int piece_of(int units) { return round_up(chunks_for(units, chunks_for(units, kMostUnits)), kUnitStep); }

// So many rows take panels as they are: compressed ones are widened beside the products, for each block
// again. With more the panel is widened once for all blocks, as tiles need it. Measured.
constexpr int kAllRows = 1 << 30;
template <class W>
constexpr int kDirectRows = sizeof(W) == 1 && kHasTiles<W> ? 1 : kAllRows;
#ifdef __AVX512F__
template <>
constexpr int kDirectRows<bf12> = kHasTiles<bf12> ? 1 : 6 * kRegisterRows;
#else
template <>
constexpr int kDirectRows<bf12> = 1;  // a line does not fit into the registers
#endif

// How a part is walked through: groups of rows, pieces of the panels' depth, panels, blocks of rows. With several blocks
// deep panels are cut, and each piece is gone through for all panels, so that both operands stay in the caches.
template <class W>
struct Walk {
    const Rows<W>& x;
    const Weights& w;
    const Part& part;
    int units, depth, group;

    Walk(const Rows<W>& x, const Weights& w, const Part& part, bool in_pieces) : x(x), w(w), part(part), units(part.unit1 ? part.unit1 - part.unit0 : units_of<W>(w.K)) {
        const bool cut = in_pieces && kHasTiles<W> && !x.in_registers && part.row1 - part.row0 > kBlockRows<W>;
        depth = cut ? piece_of(units) : units;
        const long row_bytes = cut ? depth * kPerUnit<W> * sizeof(Act<W>) : x.ldx * sizeof(Act<W>);
        group = std::max<int>(1, kGroupBytes / row_bytes / kBlockRows<W>) * kBlockRows<W>;
    }

    static const bf16* widened(const char* panel, int units, const Beside<W>& side) {
        static thread_local Buffer<bf16> buffer;
        bf16* to = buffer.at_least(size_t(units) * kLineWeights);
        widen_panel(panel, units, side, to);
        return to;
    }

    // body(term, rows, first row, panel, first unit). The terms of widened panels are of bfloat16.
    template <class Body>
    void run(TileState& tiles, Body&& body) const {
        const long panel_bytes = long(units_of<W>(w.K)) * kLine<W>;
        const char* data = w.data + part.unit0 * long(kLine<W>);
        for (int m0 = part.row0; m0 < part.row1; m0 += group) {
            const int m1 = std::min(part.row1, m0 + group), blocks = chunks_for(m1 - m0, kBlockRows<W>);
            tiles.panel_stays = blocks > 1, tiles.are_off = x.in_registers;
            for (int from = 0; from < units; from += depth) {
                const int length = std::min(depth, units - from);
                for (int p = part.panel0; p < part.panel1; p++) {
                    const char *panel = data + p * panel_bytes + from * long(kLine<W>), *next = panel + panel_bytes;
                    if (p + 1 == part.panel1 && from + length < units)
                        next = data + part.panel0 * panel_bytes + (from + length) * long(kLine<W>);
                    else if (p + 1 == part.panel1 && part.then)
                        next = part.then;
                    const Beside<W> side = beside<W>(w, p, part.unit0 + from, length);
                    const bf16* wide = nullptr;
                    if constexpr (kDirectRows<W> < kAllRows)
                        if (m1 - m0 > kDirectRows<W>) wide = widened(panel, length, side);
                    for (int m = m0, rows, index = 0; m < m1; m += rows, index++) {
                        rows = block_size<W>(m1 - m, x.in_registers);
                        const Ahead ahead = m0 == part.row0 ? ahead_of<W>(next, length * long(kLine<W>), length / kUnitStep, blocks, index, part.alone) : Ahead{};
                        const Act<W>* of = x.x + m * x.ldx + from * kPerUnit<W>;
                        if constexpr (kDirectRows<W> < kAllRows)
                            if (wide) {
                                body(Term<bf16>{of, x.ldx, reinterpret_cast<const char*>(wide), length, ahead, side}, rows, m, p, from);
                                continue;
                            }
                        body(Term<W>{of, x.ldx, panel, length, ahead, side}, rows, m, p, from);
                    }
                }
            }
        }
    }
};

// y [rows, ldy] (+)= x w, for whole panels of weights without scale.
template <bool add, class W>
void multiply_into(const Rows<W>& x, const Weights& w, const Part& part, float* y, long ldy) {
    TileState tiles;
    auto one = [&](const auto& term, int rows, int m, int p, int from) {
        float* to = y + m * ldy + p * kPanel;
        if (add || from)
            block<true>(&term, 1, rows, to, ldy, tiles);
        else
            block<false>(&term, 1, rows, to, ldy, tiles);
    };
    Walk<W>(x, w, part, true).run(tiles, one);
}

template <class W, class Sink>
void multiply_panels(const Rows<W>& x, const Weights& w, const Part& part, Sink&& sink) {
    constexpr int kSums = kBlockRows<W> * kPanel;
    alignas(64) float sums[2 * kSums];
    TileState tiles;
    // The block whose sums are complete: the sink gets them, row by row, while the tiles work on the next block.
    struct Done {
        int row = 0, rows = 0, panel = 0;
        float* sums = nullptr;
    } done;
    auto hand_over = [&](int rows) {
        rows = std::min(rows, done.rows);
        if (rows <= 0) return;
        sink(done.row, rows, done.panel, done.sums);
        done.row += rows, done.rows -= rows, done.sums += rows * kPanel;
    };
    float* to = sums;
    Walk<W>(x, w, part, false).run(tiles, [&](const auto& term, int rows, int m, int p, int) {
        const int share = chunks_for(done.rows, term.units / kUnitStep);
        block<false>(&term, 1, rows, to, kPanel, tiles, [&] { hand_over(share); });
        hand_over(kBlockRows<W>);
        done = {m, rows, p, to};
        if (kHasTiles<W> && rows >= kTileRows)
            to = to == sums ? sums + kSums : sums;
        else
            hand_over(rows);
    });
    hand_over(kBlockRows<W>);
}

// A sink whose type is not known: products with codes are compiled once for all of them.
struct AnySink {
    void* context;
    void (*call)(void*, int, int, int, float*);
    void operator()(int m, int rows, int panel, float* sums) const { call(context, m, rows, panel, sums); }
};
void multiply_parts(const Rows<Codes>& x, Weights w, Part part, AnySink sink);  // of codes_products.h

// sink(row, rows, panel, sums): sums [rows][32] of one panel for rows [row, row + rows), a block or a part of it.
template <class W, class Sink>
void multiply(const Rows<W>& x, const Weights& w, const Part& part, Sink&& sink) {
    if constexpr (std::is_same<W, Codes>::value)
        multiply_parts(x, w, part, {&sink, [](void* context, int m, int rows, int panel, float* sums) { (*static_cast<std::remove_reference_t<Sink>*>(context))(m, rows, panel, sums); }});
    else
        multiply_panels(x, w, part, sink);
}
// What sinks do with a block: `columns` of `from` [rows][32] scaled, biased, and stored (or added) at y [rows, ldy].
template <bool add>
inline void put_block(float* y, long ldy, const float* sums, int rows, int columns, const float* scale, const float* bias) {
    const Mask masks[2] = {tail16(columns), tail16(columns - 16)};
    F16 factor[2], offset[2];
    for (int half = 0; half < 2; half++) {
        factor[half] = scale ? load16(scale + 16 * half) : set16(1.0f);
        offset[half] = bias ? load16(bias + 16 * half, masks[half]) : zero16();
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            float* to = y + r * ldy + 16 * half;
            F16 sum = fma16(load16(sums + r * kPanel + 16 * half), factor[half], offset[half]);
            if (add) sum = sum + load16(to, masks[half]);
            store16(to, sum, masks[half]);
        }
}

}  // namespace boomerang

#include "codes_products.h"

// Products of activations with packed weights, cut into panels; what becomes of the sums is the caller's `sink`.
#pragma once
#include "block.h"

namespace boomerang {

// How far ahead of its use a weight is fetched into the second-level cache when all rows are one block; measured. With
// several blocks each fetches its share of the next panel, so that memory and arithmetic overlap. Matrices lie in the
// order in which a step reads them, so what is fetched beyond the end of one is the beginning of the next.
constexpr long kAhead = 8192;

template <class W>
inline Ahead ahead_of(const char* panel, long panel_bytes, int blocks, int index) {
    constexpr int step = kUnitStep * kLine<W>;
    if (blocks == 1) return {panel + kAhead, step};
    if (index >= step / 64) return {};
    const int share = round_up(step / std::min(blocks, step / 64), 64);
    return {panel + panel_bytes + index * (panel_bytes / step * share), share};
}

// Rows [M, ldx] of activations.
template <class W>
struct Rows {
    const Act<W>* x;
    long ldx;
    int M;
};

// A part of a product: rows [row0, row1) by panels [panel0, panel1).
struct Part {
    int row0, row1, panel0, panel1;
};

// sink(row, rows, panel, sums): sums [rows][32] of one panel for rows [row, row + rows).
template <class W, class Sink>
void multiply(const Rows<W>& x, const Weights& w, const Part& part, Sink&& sink) {
    const int units = units_of<W>(w.K);
    const long panel_bytes = long(units) * kLine<W>;
    // Rows that the second-level cache keeps while the panels of this chunk pass by.
    const int group = std::max(kBlockRows<W>, int((1 << 20) / (x.ldx * long(sizeof(Act<W>)))) / kBlockRows<W> * kBlockRows<W>);
    TileState tiles;
    alignas(64) float sums[kBlockRows<W> * kPanel];
    for (int m0 = part.row0; m0 < part.row1; m0 += group) {
        const int m1 = std::min(part.row1, m0 + group);
        for (int p = part.panel0; p < part.panel1; p++) {
            const char* panel = w.data + p * panel_bytes;
            tiles.panel_stays = m1 - m0 > kBlockRows<W>;
            const int blocks = (m1 - m0 + kBlockRows<W> - 1) / kBlockRows<W>;
            for (int m = m0, rows, index = 0; m < m1; m += rows, index++) {
                rows = block_size<W>(m1 - m);
                const Term<W> term = {x.x + m * x.ldx, x.ldx, panel, units};
                const Ahead ahead = m0 == part.row0 ? ahead_of<W>(panel, panel_bytes, blocks, index) : Ahead{};
                block<W>(&term, 1, rows, ahead, sums, kPanel, tiles);
                sink(m, rows, p, sums);
            }
        }
    }
}

// What sinks do with a block: `columns` of `from` [rows][32] scaled, biased, and stored (or added) at y [rows, ldy].
template <bool add>
inline void put_block(float* y, long ldy, const float* sums, int rows, int columns, const float* scale, const float* bias) {
    for (int half = 0; half < 2 && columns > 16 * half; half++) {
        const Mask mask = tail16(columns - 16 * half);
        const F16 factor = scale ? load16(scale + 16 * half) : set16(1.0f);
        const F16 offset = bias ? load16(bias + 16 * half, mask) : zero16();
        for (int r = 0; r < rows; r++) {
            float* to = y + r * ldy + 16 * half;
            F16 sum = fma16(load16(sums + r * kPanel + 16 * half), factor, offset);
            if (add) sum = sum + load16(to, mask);
            store16(to, sum, mask);
        }
    }
}

}  // namespace boomerang

// Products of activations with packed weights, cut into panels; what becomes of the sums is the caller's `sink`.
#pragma once
#include "block.h"

namespace boomerang {

// How far ahead of the product weights are fetched into the second-level cache; measured. Matrices lie in the order in
// which a step reads them, so what is fetched beyond the end of one is the beginning of the next.
constexpr long kAhead = 8192;

// Rows [M, ldx] of activations.
template <class W>
struct Rows {
    const Act<W>* x;
    long ldx;
    int M;
};

// A second product added to the first for rows from `first_row` on: y = x w^T + t b^T, where t is x times the other
// factor of a low-rank difference. `t.x` is row `first_row`'s. No weights: no second product.
template <class W>
struct Correction {
    Rows<W> t = {};
    Weights b;
    int first_row = 0;
};

// sink(row, rows, panel, sums): sums [rows][32] of one panel for rows [row, row + rows).
template <class W, class Sink>
void multiply(const Rows<W>& x, const Weights& w, const Correction<W>& low_rank, int panel0, int panel1, Sink&& sink) {
    const int units = units_of<W>(w.K);
    const long panel_bytes = long(units) * kLine<W>;
    const int uncorrected = low_rank.b.data ? low_rank.first_row : x.M;
    // Rows that the second-level cache keeps while the panels of this chunk pass by.
    const int group = std::max(kBlockRows<W>, int((1 << 20) / (x.ldx * long(sizeof(Act<W>)))) / kBlockRows<W> * kBlockRows<W>);
    TileState tiles;
    alignas(64) float sums[kBlockRows<W> * kPanel];
    for (int m0 = 0; m0 < x.M; m0 += group) {
        const int m1 = std::min(x.M, m0 + group);
        for (int p = panel0; p < panel1; p++) {
            const char* panel = w.data + p * panel_bytes;
            const char* next = m0 == 0 ? panel + kAhead : nullptr;
            for (int m = m0, rows; m < m1; m += rows) {
                const bool corrects = m >= uncorrected;
                rows = block_size<W>((corrects ? m1 : std::min(m1, std::max(uncorrected, m + 1))) - m);
                Term<W> terms[2] = {{x.x + m * x.ldx, x.ldx, panel, units}};
                if (corrects) {
                    const int low_units = units_of<W>(low_rank.b.K);
                    terms[1] = {low_rank.t.x + (m - uncorrected) * low_rank.t.ldx, low_rank.t.ldx, low_rank.b.data + long(p) * low_units * kLine<W>, low_units};
                }
                block<W>(terms, 1 + corrects, rows, corrects ? nullptr : next, sums, tiles);
                next = nullptr;
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

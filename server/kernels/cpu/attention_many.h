// Attention of many query tokens on tiles: scores become weights while they are in the first-level cache.
//
// Weights are powers of two above a score of the row's first panel instead of its largest score. They are kept as
// bfloat16, whose precision does not depend on their size, so what matters is that nothing overflows; then the largest
// score need not be known before the first weight, and a block of scores becomes weights while the tiles are at the next
// one. Rows whose weights add up to more than kMostTotal are left to `attend`.
#pragma once
#include "attention.h"

namespace boomerang {

constexpr int kManyTokens = 8;       // from which items are worth it
constexpr float kMostTotal = 1e20f;  // of the weights of a row

// Whether `out` is written. It is not where weights would become too large.
template <class T>
bool attend_many(const AttentionItem<T>& item, const PageShape<T>& shape, AttentionScratch<T>& scratch) {
    const int G = item.group, rows = item.num_tokens * G, Dp = shape.padded_dim, Pp = shape.padded_size, P = shape.page_size, head_dim = shape.head_dim;
    const int weights_ld = row_stride<T, Act<T>>(kPagesInBlock * Pp);
    const long page_stride = shape.page_elements(), head_offset = item.head * shape.head_elements();
    Act<T>* weights = scratch.weights.at_least(size_t(rows) * weights_ld);
    float *acc = scratch.sums.at_least(size_t(rows) * Dp), *totals = scratch.stats.at_least(size_t(rows) * 17), *shifts = totals + size_t(rows) * 16;
    std::fill(totals, totals + size_t(rows) * 16, 0.0f);
    const float slope = item.scale * kLog2E;
    const F16 factor = set16(slope);
    constexpr int kScores = kBlockRows<T> * kPanel;
    alignas(64) float scores[2 * kScores];
    TileState tiles;
    // A block of scores: rows from `row` on by a panel whose first token is at `position`, and of which `tokens` exist.
    struct Done {
        int row = 0, rows = 0, position = 0, tokens = 0, column = 0;
        const float* scores = nullptr;
    } done;
    // `all`: every row of the block sees every token of the panel.
    auto rows_to_weights = [&](auto all, const int from, const int to) {
        const bool begins = done.position == 0;
        const float* x = done.scores + long(from - done.row) * kPanel;
        Act<T>* out = weights + long(from) * weights_ld + done.column;
        float *total = totals + 16 * from, *shift = shifts + from;
        for (int r = from; r < to; r++, x += kPanel, out += weights_ld, total += 16, shift++) {
            const F16 low = load16(x), high = load16(x + 16);
            const int seen = all ? kPanel : std::min(done.tokens, item.first_position + r / G + 1 - done.position);
            const Mask masks[2] = {tail16(seen), tail16(seen - 16)};
            const F16 none = set16(-INFINITY);
            if (begins) *shift = -slope * (all ? top16(max16(low, high)) : top16(max16(choose16(masks[0], low, none), choose16(masks[1], high, none))));
            const F16 offset = set16(*shift);
            F16 w[2] = {power_of_two16<true>(fma16(low, factor, offset)), power_of_two16<true>(fma16(high, factor, offset))};
            if (!all)
                for (int half = 0; half < 2; half++) w[half] = keep16(masks[half], w[half]);
            store16(total, load16(total) + (w[0] + w[1]));
            store32(out, w[0], w[1]);
        }
    };
    auto to_weights = [&](int count) {
        const int from = done.row, to = from + std::min(count, done.rows);
        if (done.tokens == kPanel && done.position + kPanel <= item.first_position + from / G + 1)
            rows_to_weights(std::true_type{}, from, to);
        else
            rows_to_weights(std::false_type{}, from, to);
        done.row = to, done.rows -= to - from, done.scores += long(to - from) * kPanel;
    };
    int turn = 0;
    for (int page = item.first_page; page < item.end_page; page += kPagesInBlock) {
        const int pages = std::min(kPagesInBlock, item.end_page - page);
        for (int i = 0; i < pages; i++) {
            const T* k = item.k_pages + item.table[page + i] * page_stride + head_offset;
            for (int n = 0; n < Pp; n += kPanel)
                for (int r = 0, size; r < rows; r += size, turn ^= 1) {
                    size = block_size<T>(rows - r);
                    const Term<T> term = {item.q + long(r) * Dp, Dp, reinterpret_cast<const char*>(k + panel_offset<T>(n, 0, shape.k_units())), shape.k_units()};
                    const int share = chunks_for(done.rows, shape.k_units() / kUnitStep);
                    float* to = scores + turn * kScores;
                    block<false>(&term, 1, size, to, kPanel, tiles, [&] { to_weights(share); });
                    to_weights(kBlockRows<T>);
                    done = {r, size, (page + i) * P + n, std::min(kPanel, P - n), i * Pp + n, to};
                }
        }
        to_weights(kBlockRows<T>);
        weigh_values(item, shape, page, pages, weights, weights_ld, acc, tiles);
    }
    for (int r = 0; r < rows; r++) {
        totals[r] = sum16(load16(totals + 16 * r));
        if (totals[r] > kMostTotal) return false;
    }
    for (int r = 0; r < rows; r++) {
        const F16 share = set16(1.0f / totals[r]);
        Act<T>* to = item.out + (r / G) * item.out_stride + long(r % G) * head_dim;
        for (int d = 0; d < head_dim; d += 16) store16(to + d, load16(acc + long(r) * Dp + d, tail16(head_dim - d)) * share, tail16(head_dim - d));
    }
    return true;
}

}  // namespace boomerang

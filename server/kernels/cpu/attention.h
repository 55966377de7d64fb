// Paged attention for one (request, KV head, range of query tokens, range of positions): online softmax, K and V read once.
//
// A page holds K and V of `page_size` tokens per KV head, as panels: K [tokens, channels], V [channels, tokens], tokens
// and channels padded to 32. The query heads of a KV head are rows of the same blocks, so they share what is read.
#pragma once
#include "block.h"
#include "buffer.h"
#include "codes_block.h"

namespace boomerang {

constexpr int kPagesInBlock = kMostTerms;  // between two updates of the running softmax: 256 positions of pages of 32
constexpr int kQueryRows = 96;     // rows of one work item, about

struct PageSizes {
    int page_size, padded_size, head_dim, padded_dim, num_kv_heads;
    PageSizes(int page_size, int head_dim, int num_kv_heads)
        : page_size(page_size), padded_size(round_up(page_size, 32)), head_dim(head_dim), padded_dim(round_up(head_dim, 32)), num_kv_heads(num_kv_heads) {}
};

// T: type of K and V. Products with them take activations of Act<T>.
template <class T>
struct PageShape : PageSizes {
    using PageSizes::PageSizes;
    long head_elements() const { return long(padded_size) * padded_dim; }
    long page_elements() const { return head_elements() * num_kv_heads; }
    int k_units() const { return padded_dim / kPerUnit<T>; }   // of a panel of 32 tokens
    int v_units() const { return padded_size / kPerUnit<T>; }  // of a panel of 32 channels
};

constexpr int kMostHeadDim = 1024;

// Keys [head_dim] of token `slot` of a page. `k` has room for padded_dim.
template <class T>
inline void write_keys(const PageShape<T>& shape, T* k_page, int slot, T* k) {
    for (int d = shape.head_dim; d < shape.padded_dim; d++) k[d] = T{};
    char* line = reinterpret_cast<char*>(k_page + panel_offset<T>(slot, 0, shape.k_units()));
    const char* from = reinterpret_cast<const char*>(k);
    for (int u = 0; u < shape.k_units(); u++) std::memcpy(line + long(u) * kLine<T>, from + 4 * u, 4);
}

// Values [head_dim] of token `slot` of a page.
template <class T>
inline void write_values(const PageShape<T>& shape, T* v_page, int slot, const float* v) {
    // Places that hold no token yet are multiplied by zero, so they must be numbers: the first token clears its page.
    if (slot == 0) std::memset(static_cast<void*>(v_page), 0, shape.head_elements() * sizeof(T));
    const int D = shape.head_dim;
    for (int d = 0; d < D; d += 16) {
        T* to = v_page + panel_offset<T>(d, slot, shape.v_units());
        const F16 values = load16(v + d, tail16(D - d));
        if constexpr (kPerUnit<T> == 1)
            store16(to, values);
        else
            store_every_second16(to - slot % 2, slot % 2, values);
    }
}

#ifdef __AVX512F__
constexpr int kTokensAtOnce = 16;  // whose keys and values are written as whole lines

// Keys [16, padded_dim] of tokens `slot` to slot + 15, a multiple of 16.
template <class T>
inline void write_keys16(const PageShape<T>& shape, T* k_page, int slot, const T* k) {
    char* line = reinterpret_cast<char*>(k_page + panel_offset<T>(slot, 0, shape.k_units()));
    for (int u = 0; u < shape.k_units(); u += 16, line += 16 * kLine<T>) {
        __m512i block[16];
        for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(k + i * shape.padded_dim + u * kPerUnit<T>);
        transpose16(block);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(line + i * kLine<T>, block[i]);
    }
}

// Values [16, ld] of tokens `slot` to slot + 15, a multiple of 16.
template <class T>
inline void write_values16(const PageShape<T>& shape, T* v_page, int slot, const float* v, long ld) {
    if constexpr (kPerUnit<T> == 1) {
        for (int i = 0; i < 16; i++) write_values(shape, v_page, slot + i, v + i * ld);
    } else {
        if (slot == 0) std::memset(static_cast<void*>(v_page), 0, shape.head_elements() * sizeof(T));
        for (int d = 0; d < shape.head_dim; d += 16) {
            T* to = v_page + panel_offset<T>(d, slot, shape.v_units());
            const Mask mask = tail16(shape.head_dim - d);
            for (int i = 0; i < 16; i += 2, to += kPanel * kPerUnit<T>) store_pairs16(to, load16(v + i * ld + d, mask), load16(v + (i + 1) * ld + d, mask));
        }
    }
}

// Lines that the 16 tokens from `slot` on are going to write.
template <class T>
inline void prefetch_page(const PageShape<T>& shape, const T* k_page, const T* v_page, int slot) {
    if (k_page)
        for (int u = 0; u < shape.k_units(); u++) prefetch_to_write(reinterpret_cast<const char*>(k_page + panel_offset<T>(slot, 0, shape.k_units())) + u * kLine<T>);
    if (v_page)
        for (int d = 0; d < shape.padded_dim; d += 16)
            for (int i = 0; i < 16; i += kPerUnit<T>) prefetch_to_write(v_page + panel_offset<T>(d, slot + i, shape.v_units()));
}
#else
constexpr int kTokensAtOnce = 1;
#endif

template <class T>
struct AttentionItem {
    const Act<T>* q;  // [tokens * group, padded_dim]
    Act<T>* out;      // first token's first head; null: leave the parts for `merge_parts`
    float* part;      // [rows, head_dim + 2]: sums, maximum, total
    long out_stride;  // between tokens
    const T* k_pages;
    const T* v_pages;
    const int32_t* table;
    int head, group, num_tokens;
    int first_position;         // of the first query token; query i sees positions <= first_position + i
    int first_page, end_page;   // range of pages of this item
    float scale;
    int window = 0;  // a query sees so many positions up to its own; 0: all
    const int32_t* next_table = nullptr;  // first pages and head of the item that follows
    int num_next = 0, next_head = 0;
    // Whether some query does not see all positions before it.
    bool hides() const { return window && first_position + num_tokens > window; }
};

template <class T>
struct AttentionScratch {
    Buffer<float> scores, sums, stats;
    Buffer<Act<T>> weights;
    // Of pages in eight bits (attention_int8.h).
    Buffer<int8_t> query_codes, weight_codes;
    Buffer<BlockOfRow> query_blocks, weight_blocks;
    Buffer<const uint8_t*> records;
    Buffer<const char*> ahead;
};

// The largest of the first `seen` scores of a row.
inline float top_of_row(const float* scores, int seen) {
    F16 top = set16(-INFINITY);
    int n = 0;
    for (; n + 16 <= seen; n += 16) top = max16(top, load16(scores + n));
    if (n < seen) top = max16(top, choose16(tail16(seen - n), load16(scores + n), top));
    return top16(top);
}

// Scores of a row become weights 2^(slope x + shift), in place: of X, from the row's start. Zeros from `seen` to `width`.
// Returns their sum.
template <class X>
inline float weights_of_row(float* scores, int seen, int width, float slope, float shift) {
    constexpr bool fast = sizeof(X) == 2;
    X* weights = reinterpret_cast<X*>(scores);
    const F16 factor = set16(slope), offset = set16(shift);
    F16 sum = zero16();
    int n = 0;
    for (; n + 16 <= seen; n += 16) {
        const F16 e = power_of_two16<fast>(fma16(load16(scores + n), factor, offset));
        sum = sum + e;
        store16(weights + n, e);
    }
    if (n < seen) {
        const F16 e = keep16(tail16(seen - n), power_of_two16<fast>(fma16(load16(scores + n), factor, offset)));
        sum = sum + e;
        store16(weights + n, e);
        n += 16;
    }
    for (; n < width; n += 16) store16(weights + n, zero16());
    return sum16(sum);
}

// acc [rows, padded_dim] += weights [rows, pages * padded_size] x values of the `pages` from `page` on; the item's first pages
// begin the sums.
template <class T>
void weigh_values(const AttentionItem<T>& item, const PageShape<T>& shape, int page, int pages, const Act<T>* weights, int weights_ld, float* acc, TileState& tiles) {
    // Meanwhile the keys that come next are fetched, page by page: its own next ones, or the next item's first.
    auto keys_of = [&](int32_t number, int head) { return reinterpret_cast<const char*>(item.k_pages + number * shape.page_elements() + head * shape.head_elements()); };
    auto next_keys = [&](int i) -> const char* {
        const int next = page + kPagesInBlock;
        if (item.num_tokens > 1) return nullptr;  // other items have fetched them
        if (next + i < item.end_page) return keys_of(item.table[next + i], item.head);
        if (next >= item.end_page && i < item.num_next) return keys_of(item.next_table[i], item.next_head);
        return nullptr;
    };
    const int share = int(round_up(chunks_for(int(shape.head_elements() * sizeof(T)), shape.padded_dim / kPanel * shape.v_units() / kUnitStep), 64));
    const int rows = item.num_tokens * item.group, Dp = shape.padded_dim;
    for (int d = 0; d < Dp; d += kPanel) {
        Term<T> terms[kPagesInBlock];
        for (int i = 0; i < pages; i++) {
            const T* v = item.v_pages + item.table[page + i] * shape.page_elements() + item.head * shape.head_elements();
            const char* keys = next_keys(i);
            const Ahead ahead = keys ? Ahead{keys + d / kPanel * (shape.v_units() / kUnitStep) * share, share} : Ahead{};
            terms[i] = {weights + i * shape.padded_size, weights_ld, reinterpret_cast<const char*>(v + panel_offset<T>(d, 0, shape.v_units())), shape.v_units(), ahead};
        }
        for (int r = 0, size; r < rows; r += size) {
            size = block_size<T>(rows - r);
            if (page == item.first_page)
                block<false>(terms, pages, size, acc + long(r) * Dp + d, Dp, tiles);
            else
                block<true>(terms, pages, size, acc + long(r) * Dp + d, Dp, tiles);
            for (int i = 0; i < pages; i++) terms[i].x += size * long(weights_ld), terms[i].ahead = {};
        }
    }
}

// The online softmax. scores_of(page, pages, scores, columns) writes products of queries and keys, [rows, columns], padded_size
// of them for each of the `pages` from `page` on. weigh(page, pages, scores, columns, acc) adds to acc [rows, padded_dim] what the
// values there are worth, by weights of type X, which have taken the place of the scores; the item's first pages begin it.
template <class X, class T, class Scores, class Weigh>
void attend_over(const AttentionItem<T>& item, const PageSizes& shape, AttentionScratch<T>& scratch, Scores&& scores_of, Weigh&& weigh) {
    const int G = item.group, rows = item.num_tokens * G, Dp = shape.padded_dim, Pp = shape.padded_size, P = shape.page_size;
    const int columns = kPagesInBlock * Pp + 16, head_dim = shape.head_dim, padded_rows = round_up(rows, 16);  // an odd number of lines
    float *scores = scratch.scores.at_least(size_t(rows) * columns), *acc = scratch.sums.at_least(size_t(rows) * Dp);
    float* stats = scratch.stats.at_least(size_t(padded_rows) * 5);
    float *maximum = stats, *total = maximum + padded_rows, *factor = total + padded_rows, *top = factor + padded_rows, *sum = top + padded_rows;
    std::fill(maximum, maximum + padded_rows, -INFINITY);
    std::fill(total, total + padded_rows, 0.0f);
    const F16 scale = set16(item.scale), in_powers = set16(kLog2E);

    for (int page = item.first_page; page < item.end_page; page += kPagesInBlock) {
        const int pages = std::min(kPagesInBlock, item.end_page - page);
        scores_of(page, pages, scores, columns);
        // Columns that row r sees of this block: positions first to first_position + r / G.
        const int first = page * P;
        auto columns_of = [&](int positions) { return positions <= 0 ? 0 : (positions - 1) / P * Pp + (positions - 1) % P + 1; };
        auto seen_columns = [&](int r) { return columns_of(std::min(pages * P, item.first_position + r / G + 1 - first)); };
        for (int r = 0; r < rows; r++) {
            float* row = scores + long(r) * columns;
            if (P < Pp)  // padding between the pages' tokens
                for (int i = 0; i < pages; i++) std::fill(row + i * Pp + P, row + (i + 1) * Pp, -INFINITY);
            if (item.hides()) std::fill(row, row + columns_of(std::min(pages * P, item.first_position + r / G + 1 - item.window - first)), -INFINITY);
            top[r] = top_of_row(row, seen_columns(r));
        }
        // Scores become powers of two: e^(scale x - peak) = 2^(slope x + shift).
        for (int r = 0; r < rows; r += 16) {
            // At least a number: a row may see nothing of its item's first pages.
            const F16 old = load16(maximum + r), peak = max16(max16(old, load16(top + r) * scale), set16(-1e30f));
            store16(factor + r, power_of_two16<sizeof(T) == 2>(max16((old - peak) * in_powers, set16(-200.0f))));
            store16(maximum + r, peak);
        }
        for (int r = 0; r < rows; r++)
            sum[r] = weights_of_row<X>(scores + long(r) * columns, seen_columns(r), pages * Pp, item.scale * kLog2E, -maximum[r] * kLog2E);
        for (int r = 0; r < rows; r += 16) store16(total + r, fma16(load16(total + r), load16(factor + r), load16(sum + r)));
        if (page != item.first_page)
            for (int r = 0; r < rows; r++)
                for (int d = 0; d < Dp; d += 16) store16(acc + long(r) * Dp + d, load16(acc + long(r) * Dp + d) * set16(factor[r]));
        weigh(page, pages, scores, columns, acc);
    }
    for (int r = 0; r < rows; r++) {
        const float* from = acc + long(r) * Dp;
        if (item.part) {
            float* part = item.part + long(r) * (head_dim + 2);
            std::memcpy(part, from, sizeof(float) * head_dim);
            part[head_dim] = maximum[r];
            part[head_dim + 1] = total[r];
            continue;
        }
        const F16 share = set16(1.0f / total[r]);
        Act<T>* to = item.out + (r / G) * item.out_stride + long(r % G) * head_dim;
        for (int d = 0; d < head_dim; d += 16) store16(to + d, load16(from + d, tail16(head_dim - d)) * share, tail16(head_dim - d));
    }
}

template <class T>
void attend(const AttentionItem<T>& item, const PageShape<T>& shape, AttentionScratch<T>& scratch) {
    const int rows = item.num_tokens * item.group, Dp = shape.padded_dim, Pp = shape.padded_size;
    const long page_stride = shape.page_elements(), head_offset = item.head * shape.head_elements();
    TileState tiles;
    auto scores_of = [&](int page, int pages, float* scores, int columns) {
        for (int i = 0; i < pages; i++) {
            const T* k = item.k_pages + item.table[page + i] * page_stride + head_offset;
            const T* v = item.v_pages + item.table[page + i] * page_stride + head_offset;
            for (int n = 0; n < Pp; n += kPanel)
                for (int r = 0, size; r < rows; r += size) {
                    size = block_size<T>(rows - r);
                    // V of these tokens is wanted soon; with many queries other items have fetched it.
                    const Ahead ahead = {reinterpret_cast<const char*>(v + long(n) * Dp), r == 0 && item.num_tokens == 1 ? kUnitStep * kLine<T> : 0};
                    const Term<T> term = {item.q + long(r) * Dp, Dp, reinterpret_cast<const char*>(k + panel_offset<T>(n, 0, shape.k_units())), shape.k_units(), ahead};
                    block<false>(&term, 1, size, scores + long(r) * columns + i * Pp + n, columns, tiles);
                }
        }
    };
    auto weigh = [&](int page, int pages, const float* scores, int columns, float* acc) {
        weigh_values(item, shape, page, pages, reinterpret_cast<const Act<T>*>(scores), columns * int(sizeof(float) / sizeof(Act<T>)), acc, tiles);
    };
    attend_over<Act<T>>(item, shape, scratch, scores_of, weigh);
}

// Joins the parts [num_parts, rows, head_dim + 2] of one token's row into out [head_dim].
template <class X>
inline void merge_parts(const float* part, int num_parts, long stride, int head_dim, X* out) {
    float peak = -INFINITY, total = 0.0f;
    for (int i = 0; i < num_parts; i++) peak = std::max(peak, part[i * stride + head_dim]);
    for (int i = 0; i < num_parts; i++) total += part[i * stride + head_dim + 1] * std::exp(part[i * stride + head_dim] - peak);
    for (int d = 0; d < head_dim; d += 16) {
        const Mask mask = tail16(head_dim - d);
        F16 sum = zero16();
        for (int i = 0; i < num_parts; i++)
            sum = fma16(load16(part + i * stride + d, mask), set16(std::exp(part[i * stride + head_dim] - peak) / total), sum);
        store16(out + d, sum, mask);
    }
}

}  // namespace boomerang
